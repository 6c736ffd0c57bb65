"""Sample: one conversation with its images. Data formats create it, templates render it, datasets load its images.

`<image>` in a message's text marks an image, and the n-th mark is the n-th of `Sample.images`. Pure Python.

A record may say more than a conversation with images: flags that exclude a turn, a video, tools. Reading it honours
that or raises a SampleError with a kind of its own. Keys that do not change what is learned (source, license) are not
read.

    Sample.from_llava({"id": "7", "image": "7.jpg", "conversations": [{"from": "human", "value": ...}, ...]})
    Sample.from_messages({"messages": [{"role": "user", "content": [{"type": "image", "url": "7.jpg"}, ...]}, ...]})
"""

import reprlib
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from tinyllava.errors import UserError

IMAGE_TOKEN = "<image>"
# The text for an image that is a part of a message's content. LLaVA writes an image before its question like this, and
# so do our templates.
IMAGE_PART = IMAGE_TOKEN + "\n"
# LLaVA's names, and those of tools. system, user and assistant are understood as they are.
ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "function_call": "tool", "observation": "tool"}
BOX_MARKS = ("<bbox>", "<ref-object>")  # in a text, for the `objects` of its record (ms-swift)
SYSTEM_KEYS = ("system", "system_prompt", "system_message")  # keys of a record that hold its system message
# Keys of a turn, or of a whole record, that say whether it is learned. OpenAI, Mistral and OpenChat write `weight`,
# Axolotl `train` and `training`, ms-swift `loss`, verl `loss_mask`. The value 1 of the others means "not learned".
# `train_detail` is a list of characters (Axolotl): always an error. `kto_tag` is false for an undesirable answer.
LEARNED_KEYS = """weight weights loss_weight loss_weights loss_scale loss_mask loss_masks loss compute_loss calc_loss
    calculate_loss include_in_loss has_loss need_loss use_loss with_loss train training train_detail trainable is_train
    do_train is_trainable train_on train_on_turn learn learned is_learned learnable supervised is_supervised kto_tag"""
NOT_LEARNED_KEYS = "mask masked is_masked mask_loss ignore ignored ignore_loss no_loss skip_loss exclude_loss no_train"
FLAGS = dict.fromkeys(LEARNED_KEYS.split(), True) | dict.fromkeys(NOT_LEARNED_KEYS.split(), False)
FLAG_VALUES = dict.fromkeys(("1", "1.0", "true", "yes", "on"), True)
FLAG_VALUES |= dict.fromkeys(("0", "0.0", "false", "no", "off"), False)
EMPTY = ("", "none", "null", "nan", "[]", "{}")  # cells of tables that say nothing
FLAG_VALUES |= dict.fromkeys(EMPTY, None)
# What says more than text and images: the kind under which a record is counted -> keys of a record or a turn.
UNSUPPORTED = {
    "unsupported_video": "video videos video_list video_path video_paths video_file video_files video_url video_urls",
    "unsupported_audio": "audio audios audio_path audio_paths audio_file audio_url audio_urls speech sound sounds",
    "unsupported_tool": "tools functions tool_calls function_call",
    "unsupported_preference": "chosen rejected rejected_response rejected_messages",
    "unsupported_text": "history documents reasoning_content thinking chat_template_kwargs",
}
KIND_OF_KEY = {key: kind for kind, keys in UNSUPPORTED.items() for key in keys.split()}
# Keys whose images are not read. Beside images that are read, they are only where those come from.
UNREAD_IMAGES = "image_path image_paths image_file image_files image_url image_urls img imgs img_path picture"
UNREAD_IMAGES = dict.fromkeys(UNREAD_IMAGES.split(), "unsupported_image_key")
WORDS = ("video", "audio", "file", "tool")  # in the type of a part and in the role of a turn: a kind for each
# Keys under which a dict may hold its image: `datasets`, transformers, OpenAI and Anthropic.
IMAGE_KEYS = ("bytes", "image", "image_url", "url", "path", "source", "base64", "data")


class SampleError(UserError):
    """One sample cannot be used. `kind` says why in one word: no_conversation, turn_order, placeholders, ..."""

    def __init__(self, kind: str, text: str, sample_id: str = ""):
        super().__init__(kind, text, sample_id)
        self.kind, self.text, self.sample_id = kind, text, sample_id

    def __str__(self) -> str:
        return f"sample '{self.sample_id:.80}': {self.text}" if self.sample_id else self.text


@dataclass
class Message:
    """One turn: its role (system, user or assistant), and its text with `<image>` in the place of each image.

    learned: whether an answer is supervised in training. If it is not, it is only context for the next turns.
    """

    role: str
    text: str
    learned: bool = True


@dataclass
class Sample:
    """A conversation and its images, in order and in any of the forms of references.py."""

    messages: list[Message]
    images: list[Any] = field(default_factory=list)
    id: str = ""

    @classmethod
    def from_llava(cls, record: dict[str, Any]) -> "Sample":
        """From `{"id", "image": str | list | None, "conversations": [{"from": human|gpt|system, "value"}]}`."""
        return cls._from_turns(record, "conversations", "from", "value")

    @classmethod
    def from_messages(cls, record: dict[str, Any]) -> "Sample":
        """From `{"messages": [{"role", "content": str | parts}], "images": [...]}`, the convention of the Hub.

        Parts are `{"type": "text", "text"}` and `{"type": "image", ...}`. An image part that holds no image, and every
        `<image>` in a text, takes the next image of `images`.
        """
        return cls._from_turns(record, "messages", "role", "content")

    @classmethod
    def _from_turns(cls, record: dict[str, Any], key: str, role_key: str, text_key: str) -> "Sample":
        """Read both conventions. A system message beside the turns becomes the first turn."""
        sample_id = "" if record.get("id") is None else str(record["id"])
        _refuse_unsupported(record, sample_id)
        messages, images, waiting = [], [], _list_images(record, sample_id)
        turns = _find_turns(record, key, text_key, sample_id)
        systems = [record[key] for key in SYSTEM_KEYS if not _is_empty(record.get(key))]
        turns = [{role_key: "system", text_key: text} for text in systems] + turns
        default = _read_flag(record, "record", sample_id)
        for turn in turns:
            role, text, content = _read_role(turn.get(role_key), sample_id), "", turn.get(text_key)
            parts = content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]
            for part in parts:
                piece, embedded = _read_part(part, sample_id)
                taken = 0 if embedded else piece.count(IMAGE_TOKEN)
                images += embedded or waiting[:taken]
                waiting, text = waiting[taken:], text + piece
            messages.append(Message(role, text, _is_learned(turn, parts, role, default, sample_id)))
        if not _is_empty(record.get("objects")) and any(mark in turn.text for turn in messages for mark in BOX_MARKS):
            text = f"its text has {' or '.join(BOX_MARKS)}, but its `objects` are not read. Write the boxes as text"
            raise SampleError("unsupported_boxes", text, sample_id)
        _refuse_unsupported(record, sample_id, {} if images or waiting else UNREAD_IMAGES)
        return cls(_merge_turns(messages), images + waiting, sample_id)

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
                apart = at and turns[at - 1].learned != message.learned
                reason = ": two answers in a row are joined only if both are learned, or neither" if apart else ""
                text = f"turn {at + 1} has the role '{message.role}', expected '{expected}'{reason}"
                raise SampleError("turn_order", text, self.id)
            if message.role == "assistant" and IMAGE_TOKEN in message.text:
                raise SampleError("placeholders", f"an answer holds {IMAGE_TOKEN}; only a question can", self.id)
        if (turns[-1].role == "assistant") != answered:
            wanted = "an answer" if answered else "a question"
            raise SampleError("turn_order", f"it ends with a turn of the {turns[-1].role}, expected {wanted}", self.id)


def _is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: null, NaN, false or "", or a list or mapping of such values."""
    if isinstance(value, dict | list | tuple):
        return all(map(_is_empty, value.values() if isinstance(value, dict) else value))
    return not value if isinstance(value, bytes) else str(value).strip().lower() in (*EMPTY, "false")


def unwrap_image(reference: Any) -> Any:
    """The image that a dict holds, at any depth; None if it holds none. All other references are returned unchanged."""
    while isinstance(reference, dict):
        key = next((key for key in IMAGE_KEYS if not _is_empty(reference.get(key))), None)
        reference = reference.get(key)
        if key in ("base64", "data") and isinstance(reference, str) and not reference.startswith("data:"):
            reference = f"data:;base64,{reference}"  # never a path
    return reference


def _list_images(record: dict[str, Any], sample_id: str) -> list[Any]:
    """The record's own images: `image` or `images`, one or a list. Empty cells stand for no image."""
    cells = [record.get(key) for key in ("image", "images")]
    lists = [cell if isinstance(cell, list | tuple) else [cell] for cell in cells]
    image, images = ([image for image in each if not _is_empty(image)] for each in lists)
    if image and images and image != images:
        text = f"its `image` {reprlib.repr(image):.80} and `images` {reprlib.repr(images):.80} differ. Remove one"
        raise SampleError("contradiction", text, sample_id)
    return image or images


def _refuse_unsupported(holder: dict[str, Any], sample_id: str, kinds: dict[str, str] = KIND_OF_KEY) -> None:
    """Raise SampleError if a record, a turn or a part holds a video, tools, or anything else that is not read."""
    for key in sorted(holder.keys() & kinds.keys()):
        if not _is_empty(holder[key]):
            text = f"its '{key}' ({reprlib.repr(holder[key]):.80}) is not supported. Remove the key or the record"
            raise SampleError(kinds[key], text, sample_id)


def _find_kind(name: Any, otherwise: str) -> str:
    """The kind for the type of a part, or for the role of a turn, that is not read."""
    return next((f"unsupported_{word}" for word in WORDS if word in str(name)), otherwise)


def _read_flag(holder: dict[str, Any], name: str, sample_id: str) -> bool | None:
    """Whether all flags of a turn or a part (`name`: its role) or of the record say "learned"; None without flags."""
    flags = []
    for key in sorted(holder.keys() & FLAGS.keys()):
        value, shown = str(holder[key]).strip().lower(), f"`{key}: {reprlib.repr(holder[key]):.80}` of the {name}"
        if value not in FLAG_VALUES and (name, key) != ("record", "mask"):  # that may be the mask of its image
            text = f"{shown} is neither 0 (not learned) nor 1 (learned). Change it, or remove it"
            raise SampleError("unsupported_weight", text, sample_id)
        flag = FLAG_VALUES.get(value)
        flags += [] if flag is None else [flag == FLAGS[key]]
        # A weight of 1 is often there for every turn, and changes nothing.
        if name in ("user", "system") and flag and FLAGS[key] and "weight" not in key:
            text = f"{shown} asks to learn it, but only answers are learned. Remove it"
            raise SampleError("unsupported_weight", text, sample_id)
    return all(flags) if flags else None


def _is_learned(turn: dict, parts: list[dict], role: str, default: bool | None, sample_id: str) -> bool:
    """Whether a turn is learned: by its own flags and those of its parts, or else by the flag of its record."""
    flags = {_read_flag(part, role, sample_id) for part in parts}
    if len(flags) > 1:
        text = f"parts of the {role}'s content have different flags. Give one flag to the whole turn"
        raise SampleError("unsupported_weight", text, sample_id)
    flags = (flags | {_read_flag(turn, role, sample_id)}) - {None}
    return role != "assistant" or all(flags or {default is not False})


def _merge_turns(messages: list[Message]) -> list[Message]:
    """Join turns of the same role in a row with a line break, because the chat templates of many LLMs refuse them.

    A system message that is given twice is kept once. Answers of which only some are learned cannot be joined, and
    `Sample.check` refuses them.
    """
    merged = []
    for (role, learned), turns in groupby(messages, lambda message: (message.role, message.learned)):
        texts = [turn.text for turn in turns]
        *texts, last = dict.fromkeys(texts) if role == "system" else texts
        lines = (text if text.endswith("\n") or not text else f"{text}\n" for text in texts)
        merged.append(Message(role, "".join(lines) + last, learned))
    return merged


def _find_turns(record: dict[str, Any], key: str, text_key: str, sample_id: str) -> list[dict[str, Any]]:
    """The turns of a record. A last turn whose answer is missing, as in evaluation sets, is left out."""
    turns = record.get(key)
    if not isinstance(turns, list | tuple) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise SampleError("no_conversation", f"its '{key}' is not a list of turns", sample_id)
    for turn in turns:
        _refuse_unsupported(turn, sample_id)
        if turn.keys() & {"image", "images"} and _list_images(turn, sample_id):
            text = "a turn has images of its own: list them in the record's `images`, with <image> in the text"
            raise SampleError("placeholders", text, sample_id)
    last = turns[-1]
    is_open = last.get(text_key) is None and (last.get("from") or last.get("role")) in ("gpt", "assistant")
    return list(turns[:-1] if is_open else turns)


def _read_part(part: Any, sample_id: str) -> tuple[str, list[Any]]:
    """The text for one part of a message's content, and a list with the image that the part holds, if any."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if isinstance(part, dict):
        _refuse_unsupported(part, sample_id)
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(text := part.get("text"), str):
            raise SampleError("no_conversation", f"a text is {type(text).__name__}, expected a string", sample_id)
        return text, []
    if kind not in ("image", "image_url", "input_image"):
        text = f"content of type {reprlib.repr(kind):.80} is neither text nor image"
        raise SampleError(_find_kind(kind, "placeholders"), text, sample_id)
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
        text = f"a turn has the role {reprlib.repr(name):.80}, expected human, gpt, system, user or assistant"
        raise SampleError(_find_kind(role, "turn_order"), text, sample_id)
    return role
