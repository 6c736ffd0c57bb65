"""StreamingDataset: the same items and checks as SupervisedDataset, one after another, for data too large to keep.

Their lengths and their number are not known in advance. The planner takes windows of one global batch from it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tinyllava.config import DataSpec
from tinyllava.data.bad_records import SHORTENED, BadRecords, WorkerError, describe_bad_record
from tinyllava.data.collate import make_image_inputs
from tinyllava.data.encode import Encoder, expand
from tinyllava.data.images import open_image
from tinyllava.data.options import DataOptions
from tinyllava.data.sample import Sample, SampleError
from tinyllava.data.sources import Source
from tinyllava.data.tiles import count_image_tokens, to_draft_size
from tinyllava.errors import UserError


class StreamingDataset(torch.utils.data.IterableDataset):
    """A stream of items like those of SupervisedDataset.

    Shards are shuffled, and records in a buffer of a thousand. Several sources are mixed in proportion to their
    weights. The order is the same in every run, so a run resumes by skipping. `bad_records` counts what this process
    dropped.
    """

    def __init__(
        self, specs: Sequence[DataSpec], origins: list[Source], encoder: Encoder, options: DataOptions
    ) -> None:
        if mapped := [spec.path for spec, source in zip(specs, origins, strict=True) if not source.streaming]:
            raise UserError(
                f"{mapped[0]} does not stream but others do. Set `streaming: true` for all data of a stage, or none."
            )
        self.origins, self.weights = origins, np.array([spec.weight for spec in specs])
        self.encoder, self.pixels, self.draft = encoder, options.pixels, options.draft
        self.on_bad_sample, self.seed = options.on_bad_sample, options.seed
        self.bad_records = BadRecords()
        common = {"streaming": True, "tokenised": encoder.hash_options()}  # what decides the tokens of a record
        self.sources = [
            {"path": spec.path, "fingerprint": source.fingerprint, "files": source.key, "weight": spec.weight, **common}
            for spec, source in zip(specs, origins, strict=True)
        ]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        index = 0
        for source, record in self._mix_records():
            try:
                item = self._make_item(source, source.to_sample(record))
            except SampleError as error:
                if self.on_bad_sample == "error":
                    raise WorkerError(describe_bad_record(record["id"], error)) from None
                self.bad_records.add(error.kind, record["id"], error.text)
                continue
            yield {**item, "index": index}
            index += 1

    def _mix_records(self) -> Iterator[tuple[Source, dict[str, Any]]]:
        streams = [source.iterate(self.seed) for source in self.origins]
        open_streams = list(range(len(streams)))
        random = np.random.default_rng(self.seed)
        while open_streams:
            weights = self.weights[open_streams]
            chosen = open_streams[random.choice(len(open_streams), p=weights / weights.sum())]
            record = next(streams[chosen], None)
            if record is None:
                open_streams.remove(chosen)
            else:
                yield self.origins[chosen], record

    def _make_item(self, source: Source, sample: Sample) -> dict[str, Any]:
        encoder, row = self.encoder, self.encoder.encode(sample, source.roots)
        if row["shortened"]:
            self.bad_records.add(SHORTENED, sample.id, row["detail"])
        grids = row["grids"]  # shortening may have dropped the last images
        counts = count_image_tokens(encoder.tokens_per_image, grids)
        ids, labels = expand(np.array(row["input_ids"]), np.array(row["labels"]), encoder.image_token, counts)
        kept = zip(sample.images, grids, strict=False)
        images = [open_image(image, source.roots, draft=to_draft_size(self.draft, grid)) for image, grid in kept]
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            **make_image_inputs(self.pixels, images, grids if encoder.tiles else None),
        }
