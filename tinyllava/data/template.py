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

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tinyllava.config import NATIVE_TEMPLATE
from tinyllava.data.fit import compare_ids, find_format, use_known_end, write_probe
from tinyllava.data.labels import Span, mask
from tinyllava.data.rendering import OURS, ChatFormat, render_jinja, select_learned
from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample
from tinyllava.data.special_tokens import add_image_token as add_image_token
from tinyllava.data.special_tokens import image_token_id, require_fast, swallows_space
from tinyllava.errors import UserError
from tinyllava.factory import Factory

# Templates that the original TinyLLaVA Factory had.
ORIGINALS = ("pretrain", "phi", "llama", "gemma", "qwen2_base", "qwen2_instruct")


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
            return CompatTemplate.load_original(name)
        if name == NATIVE_TEMPLATE:
            return Template(name, None)
        is_path = name.endswith(".jinja") or "/" in name
        part = Path(name).expanduser() if is_path else Factory("templates").get(name)
        if isinstance(part, type):
            part = part()
        if isinstance(part, Template):
            return part
        return Template(name, read_source(part) if isinstance(part, Path) else part)

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

    def bind(self, tokenizer: Any) -> BoundTemplate:
        """Fit this template to a tokenizer. Raises UserError if labels would not be exact."""
        require_fast(tokenizer)
        source = self.source or read_native_source(tokenizer)
        key = (tokenizer, source)  # a tokenizer's own template may change
        if key not in self.bound:
            chat_format = find_format(self.name, use_known_end(self.name, source, tokenizer), tokenizer)
            probe = write_probe(self.name, chat_format, tokenizer)
            ids, *prompt_ids = [self.tokenize(text, tokenizer)[0] for text in (probe.text, *probe.prompts)]
            compare_ids(self.name, probe, ids, prompt_ids)
            self.bound[key] = BoundTemplate(self, tokenizer, chat_format)
        return self.bound[key]

    def bind_to_train(self, tokenizer: Any) -> BoundTemplate:
        """`bind` for training, which requires exact labels."""
        return self.bind(tokenizer)

    def bind_untried(self, tokenizer: Any) -> BoundTemplate:
        """Bind this template as it is, without testing whether labels are exact with the tokenizer."""
        source = self.source or read_native_source(tokenizer)
        key = (tokenizer, source, "untried")
        if key not in self.bound:
            self.bound[key] = BoundTemplate(self, tokenizer, find_format(self.name, source, tokenizer))
        return self.bound[key]

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


class ServedTemplate(Template):
    """The chat template of another project's checkpoint. Prompts use it as it is. Training requires exact labels.

    Those of llava-hf are not exact: the prompt ends before the space with which the answer begins.
    """

    def bind(self, tokenizer: Any) -> BoundTemplate:
        return self.bind_untried(tokenizer)

    def bind_to_train(self, tokenizer: Any) -> BoundTemplate:
        Template.bind(self, tokenizer)  # raises UserError if labels would not be exact
        return self.bind(tokenizer)


class CompatTemplate(Template):
    """The ids and labels of the original TinyLLaVA Factory (commit 53f12c7, `tinyllava/data/template/base.py`).

    A question has at most one image, at its start. A first turn that is not the user's is skipped. The text before and
    after an image is tokenised separately, so SentencePiece adds a `▁` after the image. A chat template cannot express
    that: with the jinja of `get_chat_template`, other programs tokenise this place differently.
    """

    compat = True
    # The original did not fill the place of the answer in the prompt of its pretrain format.
    PRETRAIN_PROMPT = "{{content}}\n:"

    @classmethod
    def load_original(cls, name: str) -> "CompatTemplate":
        if name not in ORIGINALS:
            raise UserError(f"compat=True is for the original's templates ({', '.join(ORIGINALS)}), not for '{name}'.")
        return cls(name, read_source(Factory("templates").find_path(name)))

    def adapt(self, sample: Sample) -> Sample:
        skipped = bool(sample.messages) and sample.messages[0].role != "user"
        turns = [
            Message("user", self._adapt_question(turn.text)) if turn.role == "user" else turn
            for turn in sample.messages[skipped:]
        ]
        return replace(sample, messages=turns)

    def _adapt_question(self, text: str) -> str:
        if self.name == "pretrain":
            return IMAGE_TOKEN  # in every turn, even of a sample without an image
        return (IMAGE_PART + text.replace(IMAGE_TOKEN, "").strip()).strip() if IMAGE_TOKEN in text else text

    def render(self, sample: Sample, tokenizer: Any, prompt: bool = False) -> tuple[str, list[Span]]:
        text, spans = render_jinja(self.source, sample, tokenizer, prompt)
        return text + self.PRETRAIN_PROMPT if prompt and self.name == "pretrain" else text, spans

    def tokenize(self, text: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
        require_fast(tokenizer)
        pieces, ids, offsets, at = text.split(IMAGE_TOKEN), [], [], 0
        # The original used slow tokenizers. They add their `▁` also before a leading space; fast ones do not.
        lead = [int(piece.startswith(" ") and swallows_space(tokenizer)) for piece in pieces]
        doubled = [" " * spaces + piece for spaces, piece in zip(lead, pieces, strict=True)]
        encoded = tokenizer(doubled, return_offsets_mapping=True)
        has_bos = encoded["input_ids"][0][:1] == [tokenizer.bos_token_id]
        for number, piece in enumerate(pieces):
            if number:
                ids.append(image_token_id(tokenizer))
                offsets.append((at, at + len(IMAGE_TOKEN)))
                at += len(IMAGE_TOKEN)
            skip = int(has_bos and number > 0)  # BOS stays before the first piece only
            shift = at - lead[number]
            ids += encoded["input_ids"][number][skip:]
            offsets += [
                (max(begin + shift, at), end + shift) for begin, end in encoded["offset_mapping"][number][skip:]
            ]
            at += len(piece)
        return ids, offsets

    def bind(self, tokenizer: Any) -> BoundTemplate:
        return self.bind_untried(tokenizer)


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
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the template {path}: {error}. Give a known name or a .jinja file.") from None
