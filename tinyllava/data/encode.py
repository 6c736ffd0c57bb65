"""One record -> one row of the tokenised cache: ids with ONE <image> id an image, labels, image references, length.

A bad record also becomes a row, with its `problem` and `detail`. A second run then reports it without tokenising.
"""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, List, Value

from tinyllava.cache import digest
from tinyllava.data.images import read_image_size
from tinyllava.data.labels import IGNORE
from tinyllava.data.options import DataOptions
from tinyllava.data.references import resolve_reference
from tinyllava.data.sample import IMAGE_TOKEN, Sample, SampleError
from tinyllava.data.sources.source import to_raw_records
from tinyllava.data.template import image_token_id
from tinyllava.data.tiles import Grid, count_image_tokens

# The files whose code decides the row of a record: a change in any of them makes the cache out of date.
CODE = ("sample", "template", "fit", "rendering", "labels", "special_tokens", "encode", "references", "images", "tiles")
FEATURES = Features(
    {
        "id": Value("string"),
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "images": List(Value("string")),  # null: the image is inside the record
        "grids": List(List(Value("int32"))),  # rows and columns of each image's tiles; [1, 1]: none
        "length": Value("int32"),  # positions in the LLM, with all tokens of the images
        "supervised": Value("int32"),  # tokens that the loss sees: labels[1:] != -100
        "shortened": Value("bool"),
        "problem": Value("string"),  # null: a good sample
        "detail": Value("string"),
    }
)


class Encoder:
    """Tokenises samples with a template. A sample over `max_length` positions loses whole rounds from its end.

    With `tiles` it reads the header of every image, because its size decides how many views of `tokens_per_image` it
    has.
    """

    def __init__(self, options: DataOptions) -> None:
        # Not `options` itself: this object is sent to all processes that tokenise, which need no image processor.
        self.image_token = image_token_id(options.tokenizer)
        self.template, self.tokenizer = options.template, options.tokenizer
        self.bound = options.template.bind_to_train(options.tokenizer)
        self.tokens_per_image, self.max_length = options.tokens_per_image, options.max_length
        self.tiles, self.supervised_turns = options.tiles, options.supervised_turns

    def hash_options(self) -> str:
        """A hash of what decides ids and labels: template, tokenizer, lengths, tiles and supervised turns."""
        template, tokenizer = (self.template.source, self.template.compat), hash_tokenizer(self.tokenizer)
        options = [option for option in (self.tiles, self.supervised_turns) if option not in (None, "all")]
        return digest(*template, tokenizer, self.tokens_per_image, self.max_length, *options)

    def hash_code(self) -> str:
        """A hash of the options and of the code that encodes, so that a cache from older code is not read."""
        try:
            template_code = inspect.getsource(type(self.template))  # a user's subclass
        except (OSError, TypeError):
            template_code = repr(type(self.template))
        code = (Path(__file__).with_name(f"{file}.py").read_bytes() for file in CODE)
        return digest(self.hash_options(), self.template.name, template_code, *code)

    def encode(self, sample: Sample, roots: Sequence[str] = ()) -> dict[str, Any]:
        """The row of a sample whose images are under `roots`. Raises SampleError if it cannot be trained on."""
        sample = self.template.adapt(sample)
        sample.check()
        if self.supervised_turns == "last":
            earlier = [replace(message, learned=False) for message in sample.messages[:-1]]
            sample = replace(sample, messages=[*earlier, sample.messages[-1]])
        tiles = self.tiles
        grids = [tiles.find_grid(read_image_size(image, roots)) if tiles else (1, 1) for image in sample.images]
        row = self._make_row(sample, grids)
        if row["length"] > self.max_length:
            row = self._shorten(sample, grids, row["length"])
        if not row["supervised"]:
            text = f"its template, flags and `supervised_turns` leave nothing to learn ({row['detail'] or 'whole'})"
            raise SampleError("nothing_to_learn", text, sample.id)
        return row

    def encode_record(
        self, record: dict[str, Any], to_sample: Callable[[dict], Sample], roots: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The row of a raw record, good or bad."""
        try:
            return self.encode(to_sample(record), roots)
        except SampleError as error:
            lists = {"input_ids": [], "labels": [], "images": [], "grids": []}
            numbers = {"length": 0, "supervised": 0, "shortened": False}
            return {"id": record["id"], **lists, **numbers, "problem": error.kind, "detail": error.text}

    def _make_row(self, sample: Sample, grids: list[Grid]) -> dict[str, Any]:
        encoded = self.bound.encode(sample)
        ids, labels = encoded["input_ids"], encoded["labels"]
        marks = ids.count(self.image_token)
        if marks != len(sample.images):
            text = f"the template shows {marks} {IMAGE_TOKEN}, but it has {len(sample.images)} image(s)"
            raise SampleError("placeholders", text, sample.id)
        return {
            "id": sample.id,
            "input_ids": ids,
            "labels": labels,
            "images": [path if isinstance(path := resolve_reference(image), str) else None for image in sample.images],
            "grids": [list(grid) for grid in grids],
            "length": len(ids) - marks + sum(count_image_tokens(self.tokens_per_image, grids)),
            "supervised": sum(label != IGNORE for label in labels[1:]),
            "shortened": False,
            "problem": None,
            "detail": None,
        }

    def _shorten(self, sample: Sample, grids: list[Grid], length: int) -> dict[str, Any]:
        """The row of as many leading rounds as fit. It never cuts an image or an answer."""
        starts = [at for at, message in enumerate(sample.messages) if message.role == "user"]
        best = None
        low, high = 1, len(starts) - 1  # rounds kept
        while low <= high:  # the length grows with the number of rounds, so bisection finds the most that fit
            middle = (low + high) // 2
            kept = sample.messages[: starts[middle]]
            images = sum(message.text.count(IMAGE_TOKEN) for message in kept)
            row = self._make_row(replace(sample, messages=kept, images=sample.images[:images]), grids[:images])
            if row["length"] <= self.max_length:
                best, low = {**row, "shortened": True, "detail": f"kept {middle} of {len(starts)} rounds"}, middle + 1
            else:
                high = middle - 1
        if best is None:
            each = " + ".join(map(str, count_image_tokens(self.tokens_per_image, grids))) or "0"
            counts = each if self.tiles else f"{len(grids)} x {self.tokens_per_image}"
            text = f"{length} positions ({counts} for images)"
            text += f"; its first round alone is over max_length {self.max_length}"
            raise SampleError("too_long", text, sample.id)
        return best


def encode_table(
    table: Any, rows: list[int], encoder: Encoder, to_sample: Callable, roots: Sequence[str]
) -> dict[str, list]:
    """Encode a table of Arrow-formatted records, for `Dataset.map`: columns of rows."""
    encoded = [encoder.encode_record(record, to_sample, roots) for record in to_raw_records(table, rows[0])]
    return {column: [row[column] for row in encoded] for column in FEATURES}


def expand(
    ids: np.ndarray, labels: np.ndarray, image_token: int, counts: int | Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Repeat the n-th <image> id `counts[n]` times, unsupervised: [l], [l] -> [L], [L]."""
    is_image = ids == image_token
    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[is_image] = counts
    return np.repeat(ids, repeats), np.repeat(np.where(is_image, IGNORE, labels), repeats)


def hash_tokenizer(tokenizer: Any) -> str:
    """A hash of what the tokenizer does. It does not depend on where the tokenizer was loaded from."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"truncation": None, "padding": None}  # options of the last call, not of the tokenizer
    return digest(
        json.dumps(content, sort_keys=True),
        sorted(map(str, tokenizer.special_tokens_map.items())),
        tokenizer.chat_template,
    )
