"""The templates of the original TinyLLaVA Factory, with its ids and labels: for its checkpoints and for parity.

`Template.load(name, compat=True)` puts these steps into a Template.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyllava.data.labels import Span
from tinyllava.data.rendering import render_jinja
from tinyllava.data.sample import IMAGE_PART, IMAGE_TOKEN, Message, Sample
from tinyllava.data.special_tokens import image_token_id, require_fast, swallows_space
from tinyllava.errors import UserError
from tinyllava.factory import Factory

# Templates that the original had.
ORIGINALS = ("pretrain", "phi", "llama", "gemma", "qwen2_base", "qwen2_instruct")


def find_original(name: str) -> Path:
    """The file of one of the original's templates. Raises UserError for other names."""
    if name not in ORIGINALS:
        raise UserError(f"compat=True is for the original's templates ({', '.join(ORIGINALS)}), not for '{name}'.")
    return Factory("templates").find_path(name)


class CompatSteps:
    """The steps of `Template` as the original has them (commit 53f12c7, `tinyllava/data/template/base.py`).

    A question has at most one image, at its start. A first turn that is not the user's is skipped. The text before and
    after an image is tokenised separately, so SentencePiece adds a `▁` after the image. A chat template cannot express
    that: with the jinja of `get_chat_template`, other programs tokenise this place differently.
    """

    name: str
    source: str
    compat = True
    # The original did not fill the place of the answer in the prompt of its pretrain format.
    PRETRAIN_PROMPT = "{{content}}\n:"

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

    def bind(self, tokenizer: Any, tested: bool = False) -> Any:
        """Bind it as it is: its labels are the original's, exact or not."""
        return super().bind(tokenizer, tested)
