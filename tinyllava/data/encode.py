"""One record -> one row of the tokenised cache: ids with ONE <image> id a picture, labels, picture references, length.

A bad record is a row too, with its `problem` and `detail`, so that a second run reports it without tokenising again.
"""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, List, Value

from tinyllava.data.cache import digest
from tinyllava.data.images import Reference, image_size, is_file_reference
from tinyllava.data.sample import IMAGE_TOKEN, Sample, SampleError
from tinyllava.data.sources import rows_of
from tinyllava.data.spans import IGNORE
from tinyllava.data.template import Template, image_token_id
from tinyllava.data.tiles import Grid, Tiles, image_tokens

# What decides the row of a record.
CODE = ("sample.py", "template.py", "spans.py", "encode.py", "images.py", "tiles.py")
FEATURES = Features(
    {
        "id": Value("string"),
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "images": List(Value("string")),  # null: the picture lies inside the record
        "grids": List(List(Value("int32"))),  # rows and columns of each picture's tiles; [1, 1]: none
        "length": Value("int32"),  # after every <image> id has become as many positions as its picture takes
        "supervised": Value("int32"),  # tokens that the loss sees: labels[1:] != -100
        "shortened": Value("bool"),
        "problem": Value("string"),  # null: a good sample
        "detail": Value("string"),
    }
)


@dataclass
class Encoder:
    """Tokenises samples with a template; one over `max_length` positions loses whole rounds from its end.

    With `tiles` every picture's header is read, as its size says how many views of `tokens_per_image` it has.
    """

    template: Template
    tokenizer: Any
    tokens_per_image: int
    max_length: int
    tiles: Tiles | None = None

    def __post_init__(self) -> None:
        self.image_token = image_token_id(self.tokenizer)

    def identity(self) -> str:
        """A hash of what decides ids and labels: the template, the tokenizer, the two numbers and the tiles."""
        tokenizer, tiles = tokenizer_hash(self.tokenizer), [self.tiles] if self.tiles else []
        template = (self.template.source, self.template.compat)
        return digest(*template, tokenizer, self.tokens_per_image, self.max_length, *tiles)

    def key(self) -> str:
        """Names caches of encoded rows: `identity`, and the code that encodes (a stale cache would be silent)."""
        try:
            own_code = inspect.getsource(type(self.template))  # a user's subclass
        except (OSError, TypeError):
            own_code = repr(type(self.template))
        code = (Path(__file__).with_name(file).read_bytes() for file in CODE)
        return digest(self.identity(), self.template.name, own_code, *code)

    def encode(self, sample: Sample, roots: Sequence[str] = ()) -> dict[str, Any]:
        """The row of a sample, its pictures under `roots`. Raises SampleError for one that cannot be trained on."""
        sample = self.template.adapt(sample)
        sample.check()
        grids = [self.tiles.grid(image_size(image, roots)) if self.tiles else (1, 1) for image in sample.images]
        row = self._row(sample, grids)
        if row["length"] > self.max_length:
            row = self._shortened(sample, grids, row["length"])
        if not row["supervised"]:
            raise SampleError("nothing_to_learn", "the template supervises no token of it", sample.id)
        return row

    def row(
        self, record: dict[str, Any], to_sample: Callable[[dict], Sample], roots: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The row of a raw record, be it good or bad."""
        try:
            return self.encode(to_sample(record), roots)
        except SampleError as error:
            lists = {"input_ids": [], "labels": [], "images": [], "grids": []}
            numbers = {"length": 0, "supervised": 0, "shortened": False}
            return {"id": record["id"], **lists, **numbers, "problem": error.kind, "detail": error.text}

    def _row(self, sample: Sample, grids: list[Grid]) -> dict[str, Any]:
        encoded = self.template.encode(sample, self.tokenizer)
        ids, labels = encoded["input_ids"], encoded["labels"]
        pictures = ids.count(self.image_token)
        if pictures != len(sample.images):
            text = f"the template shows {pictures} {IMAGE_TOKEN}, but it has {len(sample.images)} image(s)"
            raise SampleError("placeholders", text, sample.id)
        return {
            "id": sample.id,
            "input_ids": ids,
            "labels": labels,
            "images": [stored_reference(image) for image in sample.images],
            "grids": [list(grid) for grid in grids],
            "length": len(ids) - pictures + sum(image_tokens(self.tokens_per_image, grids)),
            "supervised": sum(label != IGNORE for label in labels[1:]),
            "shortened": False,
            "problem": None,
            "detail": None,
        }

    def _shortened(self, sample: Sample, grids: list[Grid], length: int) -> dict[str, Any]:
        """As many leading rounds as fit; a picture or an answer is never cut."""
        starts = [at for at, message in enumerate(sample.messages) if message.role == "user"]
        best = None
        low, high = 1, len(starts) - 1  # rounds kept
        while low <= high:  # length grows with the rounds: bisect
            middle = (low + high) // 2
            kept = first_rounds(sample, starts[middle])
            row = self._row(kept, grids[: len(kept.images)])
            if row["length"] <= self.max_length:
                best, low = {**row, "shortened": True, "detail": f"kept {middle} of {len(starts)} rounds"}, middle + 1
            else:
                high = middle - 1
        if best is None:
            each = " + ".join(map(str, image_tokens(self.tokens_per_image, grids))) or "0"
            pictures = each if self.tiles else f"{len(grids)} x {self.tokens_per_image}"
            text = f"{length} positions ({pictures} for pictures)"
            text += f"; its first round alone is over max_length {self.max_length}"
            raise SampleError("too_long", text, sample.id)
        return best


def first_rounds(sample: Sample, messages: int) -> Sample:
    """The sample's first `messages` messages with the pictures that they show."""
    kept = sample.messages[:messages]
    pictures = sum(message.text.count(IMAGE_TOKEN) for message in kept)
    return replace(sample, messages=kept, images=sample.images[:pictures])


def stored_reference(image: Reference) -> str | None:
    """A path or URL as it is; None for a picture that must be fetched from the record again."""
    if isinstance(image, dict) and not image.get("bytes"):
        image = image.get("path") or image.get("url")
    return image if isinstance(image, str) and (is_file_reference(image) or image.startswith("http")) else None


def encode_table(
    table: Any, rows: list[int], encoder: Encoder, to_sample: Callable, roots: Sequence[str]
) -> dict[str, list]:
    """For `Dataset.map` over Arrow-formatted records: a table of records -> columns of rows."""
    encoded = [encoder.row(record, to_sample, roots) for record in rows_of(table, rows[0])]
    return {column: [row[column] for row in encoded] for column in FEATURES}


def expand(
    ids: np.ndarray, labels: np.ndarray, image_token: int, counts: int | Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The n-th <image> id becomes `counts[n]` of them, unsupervised. [l], [l] -> [L], [L]"""
    is_image = ids == image_token
    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[is_image] = counts
    return np.repeat(ids, repeats), np.repeat(np.where(is_image, IGNORE, labels), repeats)


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what the tokenizer does, wherever it was loaded from."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"truncation": None, "padding": None}  # what the last call asked for, not what the tokenizer is
    return digest(
        json.dumps(content, sort_keys=True),
        sorted(map(str, tokenizer.special_tokens_map.items())),
        tokenizer.chat_template,
    )
