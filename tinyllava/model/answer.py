"""Where an answer ends, what it says, and its token ids as they come."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tinyllava.data.template import Template


class Reader(NamedTuple):
    """Reads answers out of token ids."""

    tokenizer: Any
    end_ids: frozenset[int]  # any of them ends an answer: the LLM's, the tokenizer's and the template's
    end_text: str  # the template's end of turn where it is no token of its own (a line break), else empty

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any, template: Template) -> "Reader":
        """The reader of a model's answers."""
        own = model.generation_config.eos_token_id
        ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        end = template.end_of_turn(tokenizer)
        if end in tokenizer.get_added_vocab():
            return cls(tokenizer, frozenset({*ids, tokenizer.convert_tokens_to_ids(end)}), "")
        return cls(tokenizer, frozenset(ids), end)

    def has_ended(self, ids: list[int]) -> bool:
        """Whether the last of these ids ends the answer."""
        if ids[-1] in self.end_ids or not self.end_text:
            return ids[-1] in self.end_ids
        tail = ids[-4 * len(self.end_text) :]  # a character can be four bytes, and each a token
        return self.end_text in self.tokenizer.decode(tail, clean_up_tokenization_spaces=False)

    def text(self, ids: list[int]) -> str:
        """The answer up to its end, without the space around it."""
        end = next((at for at, token in enumerate(ids) if token in self.end_ids), len(ids))
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return (text.partition(self.end_text)[0] if self.end_text else text).strip()

    def settled(self, ids: list[int]) -> str:
        """The text so far without what the next token may change: half a character, a begun end of turn."""
        text = self.text(ids).rstrip("\ufffd")
        begun = (size for size in range(len(self.end_text) - 1, 0, -1) if text.endswith(self.end_text[:size]))
        return text[: len(text) - next(begun, 0)].rstrip()

    def pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        """The answer in pieces as its ids come; joined they are its `text`."""
        ids, said = [], ""
        for token in tokens:
            ids.append(token)
            text = self.settled(ids)
            if len(text) > len(said) and text.startswith(said):
                yield text[len(said) :]
                said = text
        if rest := self.text(ids)[len(said) :]:
            yield rest


def stream_ids(generate: Callable[..., Any]) -> Iterator[int]:
    """The new ids of `generate(streamer=..., stopping_criteria=...)`, of one row, as a thread makes them.

    What it raises is raised here. Closing the iterator stops it after the token at hand.
    """
    made: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    closed = threading.Event()

    def work() -> None:
        try:
            generate(streamer=_Queue(made), stopping_criteria=StoppingCriteriaList([_Closed(closed)]))
        finally:
            made.put(None)

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(work)
        try:
            while (token := made.get()) is not None:
                yield token
            done.result()
        finally:
            closed.set()


class _Queue(BaseStreamer):
    """Takes what transformers' `generate` makes: the prompt, then one id at a time."""

    def __init__(self, made: queue.SimpleQueue) -> None:
        self.made, self.is_prompt = made, True

    def put(self, value: Tensor) -> None:
        if not self.is_prompt:
            self.made.put(int(value[0]))
        self.is_prompt = False

    def end(self) -> None:
        """Not the end yet: `generate` may still raise."""


class _Closed(StoppingCriteria):
    """Stops once nobody reads any more."""

    def __init__(self, closed: threading.Event) -> None:
        self.closed = closed

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.closed.is_set(), dtype=torch.bool, device=input_ids.device)
