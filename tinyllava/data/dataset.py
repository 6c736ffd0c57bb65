"""SupervisedDataset: every sample checked, tokenised once and measured before training; pictures opened by the workers.

    build_dataset(specs, template=t, tokenizer=tok, tokens_per_image=729, pixels=processor.pixels, max_length=2048)

The tokenised rows lie in a memory-mapped Arrow file of the cache; a worker process is handed file names and an index.
Rows hold one <image> id per picture, which `__getitem__` expands, so the cache is as small as the text.
"""

import copy
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from tinyllava.config import DataSpec
from tinyllava.data.cache import cache_root, digest, locked
from tinyllava.data.collate import picture_inputs
from tinyllava.data.encode import FEATURES, Encoder, encode_table, expand
from tinyllava.data.images import Pixels, blank, open_image
from tinyllava.data.sample import SampleError
from tinyllava.data.screen import Report, WorkerError, bad_record, column, refuse, usable
from tinyllava.data.sources import Source, read
from tinyllava.data.spans import IGNORE
from tinyllava.data.streaming import StreamingDataset
from tinyllava.data.template import Template
from tinyllava.data.tiles import Grid, Tiles, draft_size, image_tokens
from tinyllava.errors import UserError

RECORDS_PER_PROCESS = 5_000  # five seconds of tokenising; a process takes one to start


class SupervisedDataset(torch.utils.data.Dataset):
    """Samples ready to train on.

    lengths, supervised: exact positions after image expansion; supervised tokens after the causal shift. [len(self)]
    ids: record ids. report: what was dropped or shortened, by kind. sources: one entry a data file, for the record.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        origins: list[Source],
        index: np.ndarray,
        *,
        encoder: Encoder,
        pixels: Pixels,
        on_bad_sample: str,
        draft: int | None,
        fingerprint: str,
        report: Report,
        sources: list[dict[str, Any]],
    ) -> None:
        self.rows, self.origins, self.index = rows.with_format("arrow"), origins, index
        self.starts = np.cumsum([0, *map(len, origins)])  # rows of origin k: starts[k] to starts[k + 1]
        self.image_token, self.tokens_per_image = encoder.image_token, encoder.tokens_per_image
        self.tiled = encoder.tiles is not None
        self.pixels, self.on_bad_sample, self.draft = pixels, on_bad_sample, draft
        self.fingerprint, self.report, self.sources = fingerprint, report, sources

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def lengths(self) -> np.ndarray:
        return column(self.rows, "length")[self.index]

    @cached_property
    def supervised(self) -> np.ndarray:
        return column(self.rows, "supervised")[self.index]

    @property
    def ids(self) -> Sequence[str]:
        return _Ids(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("lengths", "supervised")}

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"input_ids": int64 [L], "labels": int64 [L], "pixel_values": uint8 [views, 3, H, W] or None, "index": i}

        With tiles "image_grids" is there too: int64 [n, 2], rows and columns of each picture.

        With `on_bad_sample="skip"` a picture that cannot be read leaves the item in its place, nothing supervised and
        "skipped": True, so the plan of the step stands and the trainer counts it. With "error" it raises UserError.
        """
        row = int(self.index[i])
        cells = self.rows[row]
        ids, labels = (cells[name].combine_chunks().flatten().to_numpy() for name in ("input_ids", "labels"))
        grids = cells["grids"][0].as_py()
        ids, labels = expand(ids, labels, self.image_token, image_tokens(self.tokens_per_image, grids))
        images, error = self._open(row, cells["images"][0].as_py(), grids)
        if error is not None:
            if self.on_bad_sample == "error":
                raise WorkerError(bad_record(cells["id"][0].as_py(), error))
            labels = np.full_like(labels, IGNORE)
        return {
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "labels": torch.from_numpy(labels.astype(np.int64)),
            **picture_inputs(self.pixels, images, grids if self.tiled else None),
            "index": i,
            **({"skipped": True} if error is not None else {}),
        }

    def images(self, i: int) -> list[Image.Image]:
        """The pictures of sample `i`, as they come from disk; blank where one cannot be read."""
        row = int(self.index[i])
        cells = self.rows[row]
        return self._open(row, cells["images"][0].as_py(), cells["grids"][0].as_py())[0]

    def subset(self, index: np.ndarray, name: str) -> "SupervisedDataset":
        """The samples at `index` of `rows`; `name` tells its fingerprint from this one's."""
        part = copy.copy(self)
        part.__dict__ = {**self.__getstate__(), "index": index, "fingerprint": digest(self.fingerprint, name)}
        return part

    def _open(
        self, row: int, references: list[str | None], grids: list[Grid]
    ) -> tuple[list[Image.Image], SampleError | None]:
        origin = int(np.searchsorted(self.starts, row, side="right")) - 1
        source = self.origins[origin]
        if None in references:  # pictures inside the record
            record = source.record(row - int(self.starts[origin]))
            references = source.to_sample(record).images[: len(references)]
        images, first_error = [], None
        for reference, grid in zip(references, grids, strict=True):
            try:
                images.append(open_image(reference, source.roots, draft=draft_size(self.draft, grid)))
            except SampleError as error:
                images.append(blank())
                first_error = first_error or error
        return images, first_error


class _Ids(Sequence):
    """Record ids, read from the mapped file when asked for."""

    def __init__(self, dataset: SupervisedDataset) -> None:
        self.column, self.index = dataset.rows.data.column("id"), dataset.index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self.column[int(self.index[i])].as_py()


def build_dataset(
    specs: Sequence[DataSpec],
    *,
    template: Template,
    tokenizer: Any,
    tokens_per_image: int,
    pixels: Pixels,
    max_length: int,
    on_bad_sample: str = "error",
    seed: int = 0,
    cache_dir: str | Path | None = None,
    draft: int | None = None,
    tiles: Tiles | None = None,
) -> "SupervisedDataset | StreamingDataset":
    """Everything in `specs`, checked and tokenised: a SupervisedDataset, or a StreamingDataset if the specs stream.

    A spec's `weight` repeats it (2.0: twice an epoch) or draws from it (0.3: a seeded 30 %). Bad samples raise
    UserError with counts and first ids, unless `on_bad_sample="skip"`: then they are dropped and counted in `report`.
    `draft`: pixels of a view's side that are of use (see `open_image`); twice the side of the model's input is safe.
    """
    encoder = Encoder(template, tokenizer, tokens_per_image, max_length, tiles)
    origins = [read(spec, cache_dir) for spec in specs]
    if any(source.streaming for source in origins):
        return StreamingDataset(
            specs, origins, encoder, pixels=pixels, on_bad_sample=on_bad_sample, seed=seed, draft=draft
        )
    tables = [encoded(source, encoder, cache_root(cache_dir)) for source in origins]
    report: Report = {}
    index, described, start = [], [], 0
    for number, (spec, source, table) in enumerate(zip(specs, origins, tables, strict=True)):
        good = np.flatnonzero(usable(source, table, report))
        drawn = weighted(good, spec.weight, seed=(seed, number))
        index.append(drawn + start)
        start += len(table)
        described.append(
            {
                "path": spec.path,
                "fingerprint": source.fingerprint,
                "records": len(source),
                "usable": len(good),
                "weight": spec.weight,
                "samples": len(drawn),
            }
        )
    if on_bad_sample == "error":
        refuse(report, specs, sum(map(len, origins)))
    index = np.concatenate(index)
    if not len(index):
        raise UserError(f"no sample is left of {', '.join(spec.path for spec in specs)}: dropped {_counts(report)}.")
    return SupervisedDataset(
        datasets.concatenate_datasets(tables),
        origins,
        index,
        encoder=encoder,
        pixels=pixels,
        on_bad_sample=on_bad_sample,
        draft=draft,
        fingerprint=digest(encoder.identity(), *(source.fingerprint for source in origins), index.tobytes()),
        report=report,
        sources=described,
    )


def _counts(report: Report) -> str:
    return ", ".join(f"{entry['count']} {kind}" for kind, entry in report.items()) or "none, so a weight is too small"


def encoded(source: Source, encoder: Encoder, cache: Path) -> datasets.Dataset:
    """The tokenised rows of `source`, one for one, from the cache or made now."""
    key = digest(source.key, encoder.key(), *(source.roots if encoder.tiles else []))  # whose pictures were measured
    target = cache / "tokenised" / f"{key}.arrow"
    processes = min(len(source) // RECORDS_PER_PROCESS, os.cpu_count() or 1)
    with locked(target), _bars(len(source) >= RECORDS_PER_PROCESS and sys.stderr.isatty()):
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
        ).with_format(None)
        if encoder.tiles and {"missing_image", "unreadable_image"} & set(table.unique("problem")):
            target.unlink(missing_ok=True)  # the file may be there, and whole, next time
        return table


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """The progress bar of `datasets`, only where somebody waits and looks."""
    if shown or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def weighted(rows: np.ndarray, weight: float, seed: Any) -> np.ndarray:
    """`rows` as often as `weight` says: whole passes, then a seeded draw without replacement for the fraction."""
    whole, fraction = int(weight), weight - int(weight)
    drawn = np.random.default_rng(seed).permutation(rows)[: round(fraction * len(rows))]
    return np.concatenate([*[rows] * whole, np.sort(drawn)]).astype(np.int64)


def split(
    dataset: SupervisedDataset, holdout: float | int, seed: int = 0
) -> tuple[SupervisedDataset, SupervisedDataset]:
    """(train, validation): a seeded fraction (below 1) or number of the records is held out, with all their repeats."""
    rows = np.unique(dataset.index)
    count = round(holdout * len(rows)) if holdout < 1 else int(holdout)
    if not 0 < count < len(rows):
        raise UserError(
            f"cannot hold out {holdout} of {len(rows)} records for validation: both parts need at least one."
        )
    held = np.sort(np.random.default_rng(seed).permutation(rows)[:count])
    train = dataset.index[~np.isin(dataset.index, held)]
    return dataset.subset(train, f"train {holdout} {seed}"), dataset.subset(held, f"validation {holdout} {seed}")
