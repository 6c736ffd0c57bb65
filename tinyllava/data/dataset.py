"""SupervisedDataset: samples that are checked, tokenised and measured before training. Workers only open the images.

    build_dataset(specs, DataOptions(template, tokenizer, 729, processor.to_pixels, max_length=2048))

The tokenised rows are in a memory-mapped Arrow file of the cache. A worker process receives only file names and an
index. Rows hold one <image> id per image, and `__getitem__` expands it, so the cache stays small.
"""

import copy
import os
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from tinyllava.cache import digest, drop_entry, find_cache_root, hash_columns, open_entry
from tinyllava.config import DataSpec
from tinyllava.console import silence_progress
from tinyllava.data.bad_records import BadRecords, describe_bad_record
from tinyllava.data.collate import make_image_inputs
from tinyllava.data.encode import FEATURES, Encoder, encode_table, expand
from tinyllava.data.images import make_blank_image, open_image
from tinyllava.data.labels import IGNORE
from tinyllava.data.options import DataOptions
from tinyllava.data.sample import SampleError
from tinyllava.data.screen import find_usable, read_column
from tinyllava.data.sources import Source, map_tables, open_source
from tinyllava.data.streaming import StreamingDataset
from tinyllava.data.template import image_token_id
from tinyllava.data.tiles import Grid, count_image_tokens, to_draft_size
from tinyllava.errors import UserError, WorkerError

ROW_CONTENT = ("input_ids", "labels", "images", "length", "supervised")  # what decides the result of training
RECORDS_PER_PROCESS = 5_000  # five seconds of tokenising; a process takes one second to start


class SupervisedDataset(torch.utils.data.Dataset):
    """Samples ready to train on.

    lengths: exact positions of each sample after image expansion [len(self)]. supervised: its supervised tokens after
    the causal shift [len(self)]. ids: record ids. bad_records: what was dropped or shortened, by kind. sources: an
    entry for each data file, for the record of the run.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        origins: list[Source],
        index: np.ndarray,
        options: DataOptions,
        *,
        fingerprint: str,
        bad_records: BadRecords,
        facts: list[dict[str, Any]],
    ) -> None:
        self.rows, self.origins, self.index = rows.with_format("arrow"), origins, index
        self.starts = np.cumsum([0, *map(len, origins)])  # rows of origin k: starts[k] to starts[k + 1]
        # Not `options` itself: this object is sent to every worker process, which needs neither template nor tokenizer.
        self.image_token, self.tokens_per_image = image_token_id(options.tokenizer), options.tokens_per_image
        self.tiled = options.tiles is not None
        self.pixels, self.on_bad_sample, self.draft = options.pixels, options.on_bad_sample, options.draft
        self.fingerprint, self.bad_records, self.sources = fingerprint, bad_records, facts

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def lengths(self) -> np.ndarray:
        return read_column(self.rows, "length")[self.index]

    @cached_property
    def supervised(self) -> np.ndarray:
        return read_column(self.rows, "supervised")[self.index]

    @property
    def has_images(self) -> bool:
        """Whether any sample has an image."""
        counts = pc.list_value_length(self.rows.data.column("images")).to_numpy()
        return bool(counts[self.index].any())

    @cached_property
    def ids(self) -> list[str]:
        return self.rows.data.column("id").take(pa.array(self.index)).to_pylist()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("lengths", "supervised", "ids")}

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"input_ids": int64 [L], "labels": int64 [L], "pixel_values": uint8 [views, 3, H, W] or None, "index": i}

        With tiles it also has "image_grids": int64 [n, 2], rows and columns of each image.

        If an image cannot be read and `on_bad_sample` is "skip", the item has "skipped": True and nothing supervised.
        The plan of the step then stays valid, and the trainer counts the item. With "error" it raises UserError.
        """
        row = int(self.index[i])
        cells = self.rows[row]
        ids, labels = (cells[name].combine_chunks().flatten().to_numpy() for name in ("input_ids", "labels"))
        grids = cells["grids"][0].as_py()
        ids, labels = expand(ids, labels, self.image_token, count_image_tokens(self.tokens_per_image, grids))
        images, error = self._open(row, cells["images"][0].as_py(), grids)
        if error is not None:
            if self.on_bad_sample == "error":
                raise WorkerError(describe_bad_record(cells["id"][0].as_py(), error))
            labels = np.full_like(labels, IGNORE)
        return {
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "labels": torch.from_numpy(labels.astype(np.int64)),
            **make_image_inputs(self.pixels, images, grids if self.tiled else None),
            "index": i,
            **({"skipped": True} if error is not None else {}),
        }

    def load_images(self, i: int) -> list[Image.Image]:
        """The images of sample `i` as they are on disk; a grey one in place of one that cannot be read."""
        row = int(self.index[i])
        cells = self.rows[row]
        return self._open(row, cells["images"][0].as_py(), cells["grids"][0].as_py())[0]

    def select(self, index: np.ndarray, name: str) -> "SupervisedDataset":
        """A dataset of the samples at `index` of `rows`. `name` makes its fingerprint differ from this dataset's."""
        selection = copy.copy(self)
        selection.__dict__ = {**self.__getstate__(), "index": index, "fingerprint": digest(self.fingerprint, name)}
        return selection

    def _open(
        self, row: int, references: list[str | None], grids: list[Grid]
    ) -> tuple[list[Image.Image], SampleError | None]:
        origin = int(np.searchsorted(self.starts, row, side="right")) - 1
        source = self.origins[origin]
        if None in references:  # images inside the record
            record = source.get_record(row - int(self.starts[origin]))
            references = source.to_sample(record).images[: len(references)]
        images, first_error = [], None
        for reference, grid in zip(references, grids, strict=True):
            try:
                images.append(open_image(reference, source.roots, draft=to_draft_size(self.draft, grid)))
            except SampleError as error:
                images.append(make_blank_image())
                first_error = first_error or error
        return images, first_error


def build_dataset(specs: Sequence[DataSpec], options: DataOptions) -> "SupervisedDataset | StreamingDataset":
    """Check and tokenise everything in `specs`: a SupervisedDataset, or a StreamingDataset if the specs stream.

    A spec's `weight` repeats it (2.0: twice an epoch) or draws from it (0.3: a seeded 30 %). Raises UserError for bad
    samples, unless they are skipped, and when no sample is left.
    """
    encoder = Encoder(options)
    sources = [open_source(spec, options.cache_dir) for spec in specs]
    if any(source.streaming for source in sources):
        return StreamingDataset(specs, sources, encoder, options)
    tables = [encode_source(source, encoder, find_cache_root(options.cache_dir)) for source in sources]
    bad = BadRecords()
    draws = [
        draw_records(spec, source, table, bad, seed=(options.seed, number))
        for number, (spec, source, table) in enumerate(zip(specs, sources, tables, strict=True))
    ]
    if options.on_bad_sample == "error":
        bad.refuse(sum(map(len, sources)), specs[0].path if len(specs) == 1 else "RECIPE")
    starts = np.cumsum([0, *map(len, sources)])  # one more than there are draws: the last is the end
    index = np.concatenate([rows + start for (rows, _), start in zip(draws, starts, strict=False)])
    if not len(index):
        dropped = ", ".join(f"{count} {kind}" for kind, count in bad.count_kinds().items())
        paths = ", ".join(spec.path for spec in specs)
        raise UserError(f"no usable sample is left in {paths}: dropped {dropped or 'none: a weight is too small'}.")
    return SupervisedDataset(
        datasets.concatenate_datasets(tables),
        sources,
        index,
        options,
        fingerprint=digest(encoder.hash_options(), *(source.fingerprint for source in sources), index.tobytes()),
        bad_records=bad,
        facts=[entry for _, entry in draws],
    )


def draw_records(
    spec: DataSpec, source: Source, table: datasets.Dataset, bad: BadRecords, seed: tuple[int, int]
) -> tuple[np.ndarray, dict[str, Any]]:
    """The usable rows of `table`, as often as the spec's weight says, and their entry in the run's record.

    Bad rows are counted in `bad`.
    """
    good = np.flatnonzero(find_usable(source, table, bad))
    rows = apply_weight(good, spec.weight, seed)
    facts = {"path": spec.path, "fingerprint": source.fingerprint, "records": len(source), "usable": len(good)}
    content = hash_columns(table.data, ROW_CONTENT)
    return rows, {**facts, "weight": spec.weight, "samples": len(rows), "tokenised": content}


def encode_source(source: Source, encoder: Encoder, cache: Path) -> datasets.Dataset:
    """The tokenised rows of `source`, one for each record, from the cache or encoded now."""
    measured_in = source.roots if encoder.tiles else []  # with tiles, a row depends on the size of its images
    key = digest(source.key, encoder.hash_code(), *measured_in)
    target = cache / "tokenised" / f"{key}.arrow"
    table = open_entry(target, source.path, partial(_tokenise, source, encoder, key, target), map_tables)
    if encoder.tiles and {"missing_image", "unreadable_image"} & set(table.unique("problem")):
        drop_entry(target)  # next time the image may be there: do not keep the error in the cache
    return table


def _tokenise(source: Source, encoder: Encoder, key: str, target: Path) -> list[Path]:
    """Write the rows of `source`: to `target`, or to a file beside it for each process."""
    processes = min(len(source) // RECORDS_PER_PROCESS, os.cpu_count() or 1)
    with silence_progress(len(source) < RECORDS_PER_PROCESS or not sys.stderr.isatty()):
        table = source.records.map(
            partial(encode_table, encoder=encoder, to_sample=source.to_sample, roots=source.roots),
            batched=True,
            batch_size=200,
            with_indices=True,
            remove_columns=source.records.column_names,
            features=FEATURES,
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(target),
            new_fingerprint=key,
            desc=f"Tokenising {source.path}",
        )
    return [Path(file["filename"]) for file in table.cache_files]


def apply_weight(rows: np.ndarray, weight: float, seed: int | tuple[int, ...]) -> np.ndarray:
    """`rows` as often as `weight` says: whole passes, then a seeded draw without replacement for the fraction."""
    whole, fraction = int(weight), weight - int(weight)
    drawn = np.random.default_rng(seed).permutation(rows)[: round(fraction * len(rows))]
    return np.concatenate([*[rows] * whole, np.sort(drawn)]).astype(np.int64)


def hold_out(
    dataset: SupervisedDataset, holdout: float | int, seed: int = 0
) -> tuple[SupervisedDataset, SupervisedDataset]:
    """(train, validation): hold out a seeded fraction (below 1) or number of the records, with all their repeats."""
    rows = np.unique(dataset.index)
    count = round(holdout * len(rows)) if holdout < 1 else int(holdout)
    if not 0 < count < len(rows):
        raise UserError(
            f"cannot hold out {holdout} of {len(rows)} records for validation: both sides need at least one."
        )
    held = np.sort(np.random.default_rng(seed).permutation(rows)[:count])
    train = dataset.index[~np.isin(dataset.index, held)]
    return dataset.select(train, f"train {holdout} {seed}"), dataset.select(held, f"validation {holdout} {seed}")
