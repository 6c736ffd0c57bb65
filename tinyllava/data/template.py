"""Template: a chat format that turns a sample into token ids and labels, exactly as it will be served.

The format is a Hugging Face chat template, so what `encode` trains on is, token for token, what transformers and vLLM
make of the same conversation with the saved tokenizer. Labels come from the character spans of `{% generation %}`,
mapped through the tokenizer's offsets in one tokenisation of the whole text.

    template = Template.load("phi")     # or "native", or a path to your own .jinja
    add_image_token(tokenizer)
    template.encode(sample, tokenizer)  # {"input_ids", "labels"}: one <image> id a picture, -100: not learned
    template.prompt(sample, tokenizer)  # {"input_ids", "text"}: for generation
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AddedToken

from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample
from tinyllava.data.spans import OURS, Fit, Span, fit, has_token, mask, render, render_fitted
from tinyllava.errors import UserError
from tinyllava.factory import Factory


@dataclass(frozen=True)
class Template:
    """A chat format. Subclass and register it to change a step: adapt -> render -> tokenize -> labels.

    `source` is its jinja; None stands for the tokenizer's own chat template.
    """

    name: str
    source: str | None
    compat = False

    @staticmethod
    def load(name: str | Path, compat: bool = False) -> "Template":
        """The template of this name (`tinyllava list` shows them), `native`, or the one in a `.jinja` file of yours.

        `compat` reproduces the ids and labels of the original TinyLLaVA Factory, for its checkpoints and for parity.
        """
        name = str(name)
        if compat:
            return CompatTemplate.load_original(name)
        if name == "native":
            return Template(name, None)
        is_path = name.endswith(".jinja") or "/" in name
        part = Path(name).expanduser() if is_path else Factory("templates").get(name)
        if isinstance(part, type):
            part = part()
        return part if isinstance(part, Template) else Template(name, read(part) if isinstance(part, Path) else part)

    def chat_template(self, tokenizer: Any) -> str:
        """The jinja to save with the tokenizer and processor, so that others render and tokenise to the same ids."""
        return self.fit(tokenizer).source

    def end_of_turn(self, tokenizer: Any) -> str:
        """What ends an answer and so stops generation: `</s>`, `<|im_end|>`, a line break after `pretrain`."""
        return self.fit(tokenizer).end_of_turn

    def encode(self, sample: Sample, tokenizer: Any) -> dict[str, list[int]]:
        """`input_ids` with one `<image>` id a picture, and `labels`: the id where the model must produce it, else -100.

        Looks at the text only; `adapt(sample).check()` compares it with the pictures. Raises SampleError for turns out
        of order or an open question at the end, UserError for a tokenizer that does not fit.
        """
        sample = self.adapt(sample)
        sample.check_turns()
        text, spans = self.render(sample, tokenizer)
        ids, offsets = self.tokenize(text, tokenizer)
        return {"input_ids": ids, "labels": mask(ids, offsets, spans)}

    def prompt(self, sample: Sample, tokenizer: Any) -> dict[str, Any]:
        """`input_ids` and `text` up to where the model speaks; an answer that ends the sample is left out."""
        if sample.messages and sample.messages[-1].role == "assistant":
            sample = replace(sample, messages=sample.messages[:-1])
        sample = self.adapt(sample)
        sample.check_turns(answered=False)
        text, _ = self.render(sample, tokenizer, prompt=True)
        return {"input_ids": self.tokenize(text, tokenizer)[0], "text": text}

    def adapt(self, sample: Sample) -> Sample:
        """The conversation as this format reads it: the sample itself, unless a subclass rewrites it."""
        return sample

    def render(self, sample: Sample, tokenizer: Any, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and the characters of each answer in it: from the end of its prompt through its end-of-turn."""
        return render_fitted(self.fit(tokenizer), sample, tokenizer, prompt)

    def tokenize(self, text: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
        """Ids and character offsets of a whole rendered text, which already holds the special tokens it needs."""
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, marks = encoded["input_ids"], text.count(IMAGE_TOKEN)
        if marks and ids.count(image_token_id(tokenizer)) != marks:
            raise UserError(f"the tokenizer splits {IMAGE_TOKEN} into pieces. Call `add_image_token(tokenizer)` first.")
        return ids, encoded["offset_mapping"]

    def fit(self, tokenizer: Any) -> Fit:
        """The format tried with this tokenizer, once. Raises UserError where labels could not be exact."""
        require_fast(tokenizer)
        return fit(self.name, self.source or native_source(tokenizer), tokenizer, self.tokenize)


class ServedTemplate(Template):
    """The chat template of somebody else's checkpoint: asked as it is, tried for exact labels when it is trained on.

    llava-hf's cannot be: their prompt ends before the space that their answers begin after.
    """

    def encode(self, sample: Sample, tokenizer: Any) -> dict[str, list[int]]:
        Template.fit(self, tokenizer)
        return super().encode(sample, tokenizer)

    def fit(self, tokenizer: Any) -> Fit:
        return fit(self.name, native_source(tokenizer), tokenizer, None)


class CompatTemplate(Template):
    """What the original TinyLLaVA Factory fed its models (commit 53f12c7, `tinyllava/data/template/base.py`).

    One picture, at the front of its turn; a first turn that is not the user's is skipped; the pieces around a picture
    are tokenised apart, each as if it began a text, which gives SentencePiece one more `▁` after a picture. A chat
    template cannot say this last: `chat_template` gives the format, with which others make that `▁` differently.
    """

    compat = True
    # The original left the slot of the answer unfilled when it asked its pretrain format for a prompt.
    PRETRAIN_PROMPT = "{{content}}\n:"

    @classmethod
    def load_original(cls, name: str) -> "CompatTemplate":
        originals = ("pretrain", "phi", "llama", "gemma", "qwen2_base", "qwen2_instruct")
        if name not in originals:
            raise UserError(f"compat=True is for the original's templates ({', '.join(originals)}), not for '{name}'.")
        return cls(name, read(Factory("templates").path(name)))

    def adapt(self, sample: Sample) -> Sample:
        skipped = bool(sample.messages) and sample.messages[0].role != "user"
        turns = [
            Message("user", self.question(turn.text)) if turn.role == "user" else turn
            for turn in sample.messages[skipped:]
        ]
        return replace(sample, messages=turns)

    def question(self, text: str) -> str:
        if self.name == "pretrain":
            return IMAGE_TOKEN  # in every turn, even of a sample without a picture
        return (IMAGE_PART + text.replace(IMAGE_TOKEN, "").strip()).strip() if IMAGE_TOKEN in text else text

    def render(self, sample: Sample, tokenizer: Any, prompt: bool = False) -> tuple[str, list[Span]]:
        text, spans = render(self.source, sample, tokenizer, prompt)
        return text + self.PRETRAIN_PROMPT if prompt and self.name == "pretrain" else text, spans

    def tokenize(self, text: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
        require_fast(tokenizer)
        pieces, ids, offsets, at = text.split(IMAGE_TOKEN), [], [], 0
        # The original used slow tokenizers, which put their `▁` before a leading space as well; fast ones do not.
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

    def fit(self, tokenizer: Any) -> Fit:
        return fit(self.name, self.source, tokenizer, None)


def add_image_token(tokenizer: Any) -> int:
    """Make `<image>` one special token and return its id. (Embeddings that do not reach so far must be resized.)"""
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return image_token_id(tokenizer)


def image_token_id(tokenizer: Any) -> int:
    """The id of `<image>`. Raises UserError for a tokenizer without it."""
    if not has_token(tokenizer, IMAGE_TOKEN):
        raise UserError(f"the tokenizer has no {IMAGE_TOKEN} token. Call `add_image_token(tokenizer)` first.")
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


@lru_cache(maxsize=16)
def swallows_space(tokenizer: Any) -> bool:
    """Whether a leading space gets lost because the tokenizer puts one before every text that lacks it."""
    return tokenizer(" a")["input_ids"] == tokenizer("a")["input_ids"]


def require_fast(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        what = type(tokenizer).__name__
        raise UserError(
            f"labels need the offsets of a fast tokenizer, and {what} is a slow one. Load its fast version."
        )


def native_source(tokenizer: Any) -> str:
    """The tokenizer's own chat template."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            "template 'native' needs a tokenizer with a chat template, and this one has none."
            f" Name one of ours in model.template: {OURS}."
        ) from None


def read(path: Path) -> str:
    """The text of a `.jinja` file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the template {path}: {error}. Give a known name or a .jinja file.") from None
