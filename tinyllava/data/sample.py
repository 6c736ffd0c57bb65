"""Sample: one conversation with its images. Data formats create it, templates render it, datasets load its images.

`<image>` in a message's text marks an image, and the n-th mark is the n-th of `Sample.images`. Pure Python.

    Sample.from_llava({"id": "7", "image": "7.jpg", "conversations": [{"from": "human", "value": ...}, ...]})
    Sample.from_messages({"messages": [{"role": "user", "content": [{"type": "image", "url": "7.jpg"}, ...]}, ...]})
"""

from dataclasses import dataclass, field
from typing import Any

from tinyllava.errors import UserError

IMAGE_TOKEN = "<image>"
# The text for an image that is a part of a message's content. LLaVA writes an image before its question like this, and
# so do our templates.
IMAGE_PART = IMAGE_TOKEN + "\n"
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names; system, user and assistant are understood as they are
# Keys under which a dict may hold its image: `datasets`, transformers, OpenAI and Anthropic.
IMAGE_KEYS = ("bytes", "image", "image_url", "url", "path", "source", "base64", "data")


class SampleError(UserError):
    """One sample cannot be used. `kind` says why in one word: no_conversation, turn_order, placeholders, ..."""

    def __init__(self, kind: str, text: str, sample_id: str = ""):
        super().__init__(kind, text, sample_id)
        self.kind, self.text, self.sample_id = kind, text, sample_id

    def __str__(self) -> str:
        return f"sample '{self.sample_id}': {self.text}" if self.sample_id else self.text


@dataclass
class Message:
    """One turn: its role (system, user or assistant), and its text with `<image>` in the place of each image."""

    role: str
    text: str


@dataclass
class Sample:
    """A conversation and its images, in order and in any of the forms of references.py."""

    messages: list[Message]
    images: list[Any] = field(default_factory=list)
    id: str = ""

    @classmethod
    def from_llava(cls, record: dict[str, Any]) -> "Sample":
        """From `{"id", "image": str | list | None, "conversations": [{"from": human|gpt|system, "value"}]}`."""
        sample_id = _find_id(record)
        turns = _find_turns(record, "conversations", "value", sample_id)
        messages = [
            Message(_read_role(turn.get("from"), sample_id), _read_text(turn.get("value"), sample_id)) for turn in turns
        ]
        return cls(messages, _list_images(record), sample_id)

    @classmethod
    def from_messages(cls, record: dict[str, Any]) -> "Sample":
        """From `{"messages": [{"role", "content": str | parts}], "images": [...]}`, the convention of the Hub.

        Parts are `{"type": "text", "text"}` and `{"type": "image", ...}`. An image part that holds no image, and every
        `<image>` in a text, takes the next image of `images`.
        """
        sample_id = _find_id(record)
        messages, images, waiting = [], [], _list_images(record)
        for turn in _find_turns(record, "messages", "content", sample_id):
            text, content = "", turn.get("content")
            for part in content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]:
                piece, embedded = _read_part(part, sample_id)
                taken = 0 if embedded else piece.count(IMAGE_TOKEN)
                images += embedded or waiting[:taken]
                waiting, text = waiting[taken:], text + piece
            messages.append(Message(_read_role(turn.get("role"), sample_id), text))
        return cls(messages, images + waiting, sample_id)

    def to_messages(self, parts: bool = False) -> list[dict[str, Any]]:
        """The messages for a chat template: `[{"role", "content"}]` with `<image>` in the text, or with `parts`."""
        content = _split_parts if parts else str
        return [{"role": message.role, "content": content(message.text)} for message in self.messages]

    def check(self) -> None:
        """Raise SampleError unless turns are in order, all are answered, and there are as many `<image>` as images."""
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
                text = f"turn {at + 1} has the role '{message.role}', expected '{expected}'"
                raise SampleError("turn_order", text, self.id)
            if message.role == "assistant" and IMAGE_TOKEN in message.text:
                raise SampleError("placeholders", f"an answer holds {IMAGE_TOKEN}; only a question can", self.id)
        if (turns[-1].role == "assistant") != answered:
            wanted = "an answer" if answered else "a question"
            raise SampleError("turn_order", f"it ends with a turn of the {turns[-1].role}, expected {wanted}", self.id)


def unwrap_image(reference: Any) -> Any:
    """The image that a dict holds, at any depth; None if it holds none. All other references are returned unchanged."""
    while isinstance(reference, dict):
        key = next((key for key in IMAGE_KEYS if hasattr(value := reference.get(key), "shape") or value), None)
        reference = reference.get(key)  # an array has no truth value
        if key in ("base64", "data") and isinstance(reference, str) and not reference.startswith("data:"):
            reference = f"data:;base64,{reference}"  # never a path
    return reference


def _find_id(record: dict[str, Any]) -> str:
    return "" if record.get("id") is None else str(record["id"])


def _list_images(record: dict[str, Any]) -> list[Any]:
    """The record's own images: `image` or `images`, one or a list."""
    images = record.get("images") or record.get("image") or []
    return list(images) if isinstance(images, list | tuple) else [images]


def _find_turns(record: dict[str, Any], key: str, text_key: str, sample_id: str) -> list[dict[str, Any]]:
    """The turns of a record. A last turn whose answer is missing, as in evaluation sets, is left out."""
    turns = record.get(key)
    if not isinstance(turns, list | tuple) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise SampleError("no_conversation", f"its '{key}' is not a list of turns", sample_id)
    last = turns[-1]
    is_open = last.get(text_key) is None and (last.get("from") or last.get("role")) in ("gpt", "assistant")
    return list(turns[:-1] if is_open else turns)


def _read_part(part: Any, sample_id: str) -> tuple[str, list[Any]]:
    """The text for one part of a message's content, and a list with the image that the part holds, if any."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind in ("text", "input_text", "output_text"):
        return _read_text(part.get("text"), sample_id), []
    if kind not in ("image", "image_url", "input_image"):
        raise SampleError("placeholders", f"content of type '{kind}' is neither text nor image", sample_id)
    image = unwrap_image(part)
    return IMAGE_PART, [] if image is None else [image]


def _split_parts(text: str) -> list[dict[str, str]]:
    """Split a text into text parts and image parts. The line break after `<image>` is left out: templates write it."""
    first, *rest = text.split(IMAGE_TOKEN)
    parts = [{"type": "text", "text": first}]
    for piece in rest:
        parts += [{"type": "image"}, {"type": "text", "text": piece.removeprefix("\n")}]
    return [part for part in parts if part.get("text") != ""]


def _read_role(name: Any, sample_id: str) -> str:
    role = ROLES.get(name, name) if isinstance(name, str) else None
    if role not in ("system", "user", "assistant"):
        known = "human, gpt, system, user or assistant"
        raise SampleError("turn_order", f"a turn has the role {name!r}, expected {known}", sample_id)
    return role


def _read_text(value: Any, sample_id: str) -> str:
    if not isinstance(value, str):
        raise SampleError("no_conversation", f"a turn's text is {type(value).__name__}, expected a string", sample_id)
    return value
