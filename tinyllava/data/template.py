"""Template: a chat format that turns a sample into token ids and labels, with the same ids as in serving.

The format is a Hugging Face chat template. The ids of `encode` are therefore those that transformers and vLLM make of
the same conversation with the saved tokenizer. Labels come from the character spans of `{% generation %}`, which the
offsets of one tokenisation of the whole text map to tokens.

    template = Template.load("phi")     # or "native", or a path to your own .jinja
    add_image_token(tokenizer)
    bound = template.bind(tokenizer)
    bound.encode(sample)                # {"input_ids", "labels"}: one <image> id per image; -100: not supervised
    bound.encode_prompt(sample)         # {"input_ids", "text"}: for generation

rendering.py makes the text and labels.py the labels. fit.py refuses a format that is not exact with a tokenizer.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tinyllava.config import NATIVE_TEMPLATE
from tinyllava.data.fit import compare_ids, find_format, use_known_end, write_probe
from tinyllava.data.labels import Span, mask
from tinyllava.data.legacy_template import CompatSteps, find_original
from tinyllava.data.rendering import OURS, ChatFormat, select_learned
from tinyllava.data.sample import IMAGE_TOKEN, Sample
from tinyllava.data.special_tokens import add_image_token as add_image_token
from tinyllava.data.special_tokens import image_token_id, require_fast
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.sandbox import trust_template


@dataclass(frozen=True)
class BoundTemplate:
    """A template that is fitted to a tokenizer. It encodes a sample: adapt -> render -> tokenize -> mask."""

    template: "Template"
    tokenizer: Any
    chat_format: ChatFormat

    def encode(self, sample: Sample) -> dict[str, list[int]]:
        """`input_ids` with one `<image>` id per image, and `labels`: the id where the model must produce it, else -100.

        Answers that are not learned have no labels. It does not look at the images: `adapt(sample).check()` compares
        their number with the text. Raises SampleError for turns in the wrong order, and for a last question without an
        answer.
        """
        sample = self.template.adapt(sample)
        sample.check_turns()
        text, spans = self.template.render(sample, self.tokenizer)
        ids, offsets = self.template.tokenize(text, self.tokenizer)
        return {"input_ids": ids, "labels": mask(ids, offsets, select_learned(sample, spans))}

    def encode_prompt(self, sample: Sample) -> dict[str, Any]:
        """`input_ids` and `text` of the prompt, up to the answer. An answer at the end of the sample is left out."""
        if sample.messages and sample.messages[-1].role == "assistant":
            sample = replace(sample, messages=sample.messages[:-1])
        sample = self.template.adapt(sample)
        sample.check_turns(answered=False)
        text, _ = self.template.render(sample, self.tokenizer, prompt=True)
        return {"input_ids": self.template.tokenize(text, self.tokenizer)[0], "text": text}


@dataclass(frozen=True)
class Template:
    """A chat format. Subclass and register it to change a step: adapt -> render -> tokenize -> mask.

    `source` is its jinja; None stands for the tokenizer's own chat template.
    """

    name: str
    source: str | None
    # One for each tokenizer, because fitting takes longer than encoding a record. It is not sent to other processes.
    bound: dict[Any, BoundTemplate] = field(default_factory=dict, init=False, repr=False, compare=False)
    compat = False

    @staticmethod
    def load(name: str | Path, compat: bool = False) -> "Template":
        """Load a template by its name (`tinyllava list` shows all), `native`, or the path of your own `.jinja` file.

        `compat` reproduces the ids and labels of the original TinyLLaVA Factory, for its checkpoints and for parity.
        """
        name = str(name)
        if compat:
            return CompatTemplate(name, read_source(find_original(name)))
        if name == NATIVE_TEMPLATE:
            return Template(name, None)
        is_path = name.endswith(".jinja") or "/" in name
        part = Path(os.path.expanduser(name)) if is_path else Factory("templates").get(name)
        if isinstance(part, type):
            part = part()
        if isinstance(part, Template):
            return part
        trust_template(source := read_source(part) if isinstance(part, Path) else part)
        return Template(name, source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bound": {}}

    # -- what a subclass can change ------------------------------------------------------------------------------------

    def adapt(self, sample: Sample) -> Sample:
        """The sample that is rendered: `sample` itself, unless a subclass rewrites it."""
        return sample

    def render(self, sample: Sample, tokenizer: Any, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and the span of each answer in it: from the end of its prompt to the end of its end-of-turn."""
        return self.bind(tokenizer).chat_format.render(sample, tokenizer, prompt)

    def tokenize(self, text: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
        """Ids and character offsets of a whole rendered text, which already contains its special tokens."""
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, marks = encoded["input_ids"], text.count(IMAGE_TOKEN)
        if marks and ids.count(image_token_id(tokenizer)) != marks:
            raise UserError(f"the tokenizer splits {IMAGE_TOKEN} into pieces. Call `add_image_token(tokenizer)` first.")
        return ids, encoded["offset_mapping"]

    # -- with a tokenizer ----------------------------------------------------------------------------------------------

    def bind(self, tokenizer: Any, tested: bool = True) -> BoundTemplate:
        """Fit this template to a tokenizer, if `tested`; else use it as it is.

        Raises UserError if it is tested and labels would not be exact.
        """
        require_fast(tokenizer)
        source = self.source or read_native_source(tokenizer)
        key = (tokenizer, source, tested)  # a tokenizer's own template may change
        if key not in self.bound:
            known = use_known_end(self.name, source, tokenizer) if tested else source
            chat_format = find_format(self.name, known, tokenizer)
            if tested:
                probe = write_probe(self.name, chat_format, tokenizer)
                ids, *prompt_ids = [self.tokenize(text, tokenizer)[0] for text in (probe.text, *probe.prompts)]
                compare_ids(self.name, probe, ids, prompt_ids)
            self.bound[key] = BoundTemplate(self, tokenizer, chat_format)
        return self.bound[key]

    def bind_to_train(self, tokenizer: Any) -> BoundTemplate:
        """`bind` for training, which requires exact labels."""
        return self.bind(tokenizer)

    def encode(self, sample: Sample, tokenizer: Any) -> dict[str, list[int]]:
        """`bind_to_train(tokenizer).encode(sample)`: ids and labels of a conversation."""
        return self.bind_to_train(tokenizer).encode(sample)

    def encode_prompt(self, sample: Sample, tokenizer: Any) -> dict[str, Any]:
        """`bind(tokenizer).encode_prompt(sample)`: ids and text of a question."""
        return self.bind(tokenizer).encode_prompt(sample)

    def get_chat_template(self, tokenizer: Any) -> str:
        """The jinja to save with the tokenizer and processor, so that others render and tokenise to the same ids."""
        return self.bind(tokenizer).chat_format.source

    def get_end_of_turn(self, tokenizer: Any) -> str:
        """The text that ends an answer and stops generation: `</s>`, `<|im_end|>`, for `pretrain` a line break."""
        return self.bind(tokenizer).chat_format.end_of_turn


class CompatTemplate(CompatSteps, Template):
    """A template of the original TinyLLaVA Factory, with its ids and labels (see legacy_template.py)."""


def read_native_source(tokenizer: Any) -> str:
    """The tokenizer's own chat template."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            "template 'native' needs a tokenizer with a chat template, and this one has none."
            f" Name one of ours, in model.template or after `--lacking template=`: {OURS}."
        ) from None


def read_source(path: Path) -> str:
    """The text of a `.jinja` file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the template {path}: {error}. Give a known name or a .jinja file.") from None
