"""Find the end of an answer, decode its ids, and stream ids while a thread generates them."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tinyllava.data.fit import PROBE
from tinyllava.generation import Decoding
from tinyllava.model.vlm import VLM


class AnswerReader(NamedTuple):
    """Decodes answers from token ids."""

    tokenizer: Any
    end_ids: frozenset[int]  # any of them ends an answer: the LLM's, the tokenizer's and the template's
    end_text: str  # the template's end of turn if it is not one token (a line break), else empty
    stop_texts: tuple[str, ...] = ()  # they end an answer too, and are not part of it
    control_ids: frozenset[int] = frozenset()  # left out of answers: what the chat format and the tokenizer write

    @classmethod
    def from_vlm(cls, vlm: VLM) -> "AnswerReader":
        """The reader for the answers of a model."""
        tokenizer, eos = vlm.tokenizer, vlm.model.generation_config.eos_token_id
        ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        text, _ = vlm.template.render(vlm.template.adapt(PROBE), tokenizer)
        named = {getattr(tokenizer, name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
        # Other special tokens are content: `<|box_start|>` of Qwen2-VL, `<loc0001>` of PaliGemma.
        added = tokenizer.added_tokens_decoder.items()
        control = {id_ for id_, one in added if one.special and (one.content in named or one.content in text)}
        end = vlm.template.get_end_of_turn(tokenizer)
        if end in tokenizer.get_added_vocab():
            ids, end = {*ids, tokenizer.convert_tokens_to_ids(end)}, ""
        return cls(tokenizer, frozenset(ids), end, control_ids=frozenset(control))

    def add_ends(self, decoding: Decoding) -> "AnswerReader":
        """A reader for which the ends of one call end an answer too."""
        return self._replace(end_ids=self.end_ids | decoding.end_ids, stop_texts=decoding.stop_texts)

    @property
    def end_texts(self) -> list[str]:
        """All texts that end an answer."""
        return [text for text in (self.end_text, *self.stop_texts) if text]

    def has_ended(self, ids: list[int]) -> bool:
        """Whether the last of these ids ends the answer."""
        if ids[-1] in self.end_ids or not self.end_texts:
            return ids[-1] in self.end_ids
        tail = ids[-4 * max(map(len, self.end_texts)) :]  # a character has up to four bytes, and each can be a token
        text = self.tokenizer.decode(tail, clean_up_tokenization_spaces=False)
        return any(end in text for end in self.end_texts)

    def decode(self, ids: list[int]) -> str:
        """The answer up to its end, without spaces around it."""
        end = next((at for at, token in enumerate(ids) if token in self.end_ids), len(ids))
        kept = [token for token in ids[:end] if token not in self.control_ids]
        text = self.tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        return min((text.partition(end)[0] for end in self.end_texts), key=len, default=text).strip()

    def decode_settled(self, ids: list[int]) -> str:
        """The text so far, without an end that the next token may change: half a character, a part of an end text."""
        text = self.decode(ids).rstrip("\ufffd")
        # How many characters at the end of the text may be the start of an end text.
        held = (size for end in self.end_texts for size in range(1, len(end)) if text.endswith(end[:size]))
        return text[: len(text) - max(held, default=0)].rstrip()

    def stream_text(self, tokens: Iterator[int]) -> Iterator[str]:
        """The answer in pieces while its ids arrive. Joined, the pieces are what `decode` returns."""
        ids: list[int] = []
        sent = ""
        for token in tokens:
            ids.append(token)
            text = self.decode_settled(ids)
            if len(text) > len(sent) and text.startswith(sent):
                yield text[len(sent) :]
                sent = text
        if rest := self.decode(ids)[len(sent) :]:
            yield rest


def stream_ids(generate: Callable[..., Any]) -> Iterator[int]:
    """The new ids of one row, while a thread runs `generate(streamer=..., stopping_criteria=...)`.

    An error in the thread is raised here. Closing the iterator stops the thread after the current token.
    """
    ids: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    is_closed = threading.Event()

    def work() -> None:
        try:
            generate(streamer=_QueueStreamer(ids), stopping_criteria=[StopWhen(lambda _: is_closed.is_set())])
        finally:
            ids.put(None)

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(work)
        try:
            while (token := ids.get()) is not None:
                yield token
            done.result()
        finally:
            is_closed.set()


class _QueueStreamer(BaseStreamer):
    """Receives the output of transformers' `generate`: the prompt, then one id at a time."""

    def __init__(self, ids: queue.SimpleQueue) -> None:
        self.ids, self.is_prompt = ids, True

    def put(self, value: Tensor) -> None:
        if not self.is_prompt:
            self.ids.put(int(value))
        self.is_prompt = False

    def end(self) -> None:
        """Do nothing: `generate` may still raise an error, so `work` marks the end."""


class StopWhen(StoppingCriteria):
    """Stops a row of `generate` when `has_ended` is true of its ids, which begin with the prompt."""

    def __init__(self, has_ended: Callable[[list[int]], bool]) -> None:
        self.has_ended = has_ended

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.tensor([self.has_ended(row) for row in input_ids.tolist()], device=input_ids.device)
