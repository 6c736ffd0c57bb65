"""Sample: the one record everything else speaks. Readers make it, templates render it, datasets load its pictures.

`<image>` in a message's text marks a picture, and the n-th mark is the n-th of `Sample.images`. Pure Python.

    Sample.from_llava({"id": "7", "image": "7.jpg", "conversations": [{"from": "human", "value": ...}, ...]})
    Sample.from_messages({"messages": [{"role": "user", "content": [{"type": "image", "url": "7.jpg"}, ...]}, ...]})
"""

from dataclasses import dataclass, field
from typing import Any

from tinyllava.errors import UserError

IMAGE_TOKEN = "<image>"
# A picture given as a part of a message's content stands for this text: the field's habit for a picture before its
# question, and what our templates write for such a part.
IMAGE_PART = IMAGE_TOKEN + "\n"
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names; system, user and assistant are understood as they are
IMAGE_KEYS = ("image", "url", "path", "image_url")  # where an image part may hold its picture


class SampleError(UserError):
    """One sample is unusable. `kind` counts alike ones together: no_conversation, turn_order, placeholders, ..."""

    def __init__(self, kind: str, text: str, sample_id: str = ""):
        super().__init__(kind, text, sample_id)
        self.kind, self.text, self.sample_id = kind, text, sample_id

    def __str__(self) -> str:
        return f"sample '{self.sample_id}': {self.text}" if self.sample_id else self.text


@dataclass
class Message:
    """One turn: who speaks (system, user or assistant), and the text with `<image>` where a picture stands."""

    role: str
    text: str


@dataclass
class Sample:
    """A conversation and its pictures, in order: paths, URLs, bytes, `{"bytes", "path"}` or PIL images."""

    messages: list[Message]
    images: list[Any] = field(default_factory=list)
    id: str = ""

    @classmethod
    def from_llava(cls, record: dict[str, Any]) -> "Sample":
        """From `{"id", "image": str | list | None, "conversations": [{"from": human|gpt|system, "value"}]}`."""
        sample_id = _identity(record)
        turns = _turns(record, "conversations", "value", sample_id)
        messages = [Message(_role(turn.get("from"), sample_id), _text(turn.get("value"), sample_id)) for turn in turns]
        return cls(messages, _images(record), sample_id)

    @classmethod
    def from_messages(cls, record: dict[str, Any]) -> "Sample":
        """From `{"messages": [{"role", "content": str | parts}], "images": [...]}`, the convention of the Hub.

        Parts are `{"type": "text", "text"}` and `{"type": "image", ...}`; an image part without a picture of its own,
        and every `<image>` inside a text, takes the next of the record's.
        """
        sample_id = _identity(record)
        messages, images, waiting = [], [], _images(record)
        for turn in _turns(record, "messages", "content", sample_id):
            text, content = "", turn.get("content")
            for part in content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]:
                piece, own = _part(part, sample_id)
                taken = 0 if own else piece.count(IMAGE_TOKEN)
                images += own or waiting[:taken]
                waiting, text = waiting[taken:], text + piece
            messages.append(Message(_role(turn.get("role"), sample_id), text))
        return cls(messages, images + waiting, sample_id)

    def to_messages(self, parts: bool = False) -> list[dict[str, Any]]:
        """As chat templates take it: `[{"role", "content"}]` with `<image>` in the content, or a list of `parts`."""
        content = _parts if parts else str
        return [{"role": message.role, "content": content(message.text)} for message in self.messages]

    def check(self) -> None:
        """Raise SampleError unless it can be trained on: turns in order, all answered, as many `<image>` as images."""
        self.check_turns()
        marks, images = sum(message.text.count(IMAGE_TOKEN) for message in self.messages), len(self.images)
        if marks != images:
            raise SampleError("placeholders", f"{marks} {IMAGE_TOKEN} in its text, but {images} image(s)", self.id)
        if any(message.role == "assistant" and not message.text.strip() for message in self.messages):
            raise SampleError("empty_answer", "an answer is empty", self.id)

    def check_turns(self, answered: bool = True) -> None:
        """Raise SampleError unless user and assistant alternate and end on the assistant (`answered`) or the user."""
        turns = self.messages[1:] if self.messages and self.messages[0].role == "system" else self.messages
        if not turns:
            raise SampleError("no_conversation", "its conversation is empty", self.id)
        for at, message in enumerate(turns):
            expected = ("user", "assistant")[at % 2]
            if message.role != expected:
                raise SampleError("turn_order", f"turn {at + 1} is of '{message.role}', expected '{expected}'", self.id)
            if message.role == "assistant" and IMAGE_TOKEN in message.text:
                raise SampleError("placeholders", f"an answer holds {IMAGE_TOKEN}; only questions can", self.id)
        if (turns[-1].role == "assistant") != answered:
            must = "an answer" if answered else "a question"
            raise SampleError("turn_order", f"it ends on the {turns[-1].role}'s turn, expected {must}", self.id)


def _identity(record: dict[str, Any]) -> str:
    return "" if record.get("id") is None else str(record["id"])


def _images(record: dict[str, Any]) -> list[Any]:
    """The record's own pictures: `image` or `images`, one or a list."""
    found = record.get("images") or record.get("image") or []
    return list(found) if isinstance(found, list | tuple) else [found]


def _turns(record: dict[str, Any], key: str, said: str, sample_id: str) -> list[dict[str, Any]]:
    """The turns of a record, without a last one that leaves its answer open, as evaluation sets have it."""
    turns = record.get(key)
    if not isinstance(turns, list | tuple) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise SampleError("no_conversation", f"its '{key}' is no list of turns", sample_id)
    last = turns[-1]
    is_open = last.get(said) is None and (last.get("from") or last.get("role")) in ("gpt", "assistant")
    return list(turns[:-1] if is_open else turns)


def _part(part: Any, sample_id: str) -> tuple[str, list[Any]]:
    """The text that stands for a part of a message's content, and the picture that it holds itself, if any."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text":
        return _text(part.get("text"), sample_id), []
    if kind not in ("image", "image_url"):
        raise SampleError("placeholders", f"a part of type '{kind}' is neither text nor image", sample_id)
    found = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
    if isinstance(found, dict) and found.get("url"):
        found = found["url"]
    return IMAGE_PART, [] if found is None else [found]


def _parts(text: str) -> list[dict[str, str]]:
    """`<image>` and its line break as an image part, whose line break is the template's own, and a text part."""
    first, *rest = text.split(IMAGE_TOKEN)
    parts = [{"type": "text", "text": first}]
    for piece in rest:
        parts += [{"type": "image"}, {"type": "text", "text": piece.removeprefix("\n")}]
    return [part for part in parts if part.get("text") != ""]


def _role(name: Any, sample_id: str) -> str:
    role = ROLES.get(name, name) if isinstance(name, str) else None
    if role not in ("system", "user", "assistant"):
        known = "human, gpt, system, user or assistant"
        raise SampleError("turn_order", f"a turn is of {name!r}, expected {known}", sample_id)
    return role


def _text(value: Any, sample_id: str) -> str:
    if not isinstance(value, str):
        raise SampleError("no_conversation", f"a turn's text is {type(value).__name__}, expected a string", sample_id)
    return value
