"""StreamingDataset: the samples and checks of SupervisedDataset for data too large to keep, one record after the other.

Nothing is known in advance: no length, no count. The planner takes windows of a global batch from it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tinyllava.config import DataSpec
from tinyllava.data.collate import picture_inputs
from tinyllava.data.encode import Encoder, expand
from tinyllava.data.images import Pixels, open_image
from tinyllava.data.sample import Sample, SampleError
from tinyllava.data.screen import Report, WorkerError, bad_record, note
from tinyllava.data.sources import Source
from tinyllava.data.tiles import draft_size, image_tokens
from tinyllava.errors import UserError


class StreamingDataset(torch.utils.data.IterableDataset):
    """Items as SupervisedDataset gives them, shuffled over a thousand at a time and by shards; several sources are
    interleaved in proportion to their weights. The order is always the same, so a run goes on by skipping.

    `report` counts what this process dropped. DataLoader workers share a stream by its shards, as `datasets` does it: a
    stream of one shard is read by one worker.
    """

    def __init__(
        self,
        specs: Sequence[DataSpec],
        origins: list[Source],
        encoder: Encoder,
        *,
        pixels: Pixels,
        on_bad_sample: str,
        seed: int,
        draft: int | None,
    ) -> None:
        mapped = [spec.path for spec, source in zip(specs, origins, strict=True) if not source.streaming]
        if mapped:
            raise UserError(
                f"{mapped[0]} does not stream but others do. Set `streaming: true` for all data of a stage, or none."
            )
        self.origins, self.weights = origins, np.array([spec.weight for spec in specs])
        self.encoder, self.pixels, self.draft = encoder, pixels, draft
        self.on_bad_sample, self.seed = on_bad_sample, seed
        self.report: Report = {}
        self.sources = [
            {"path": spec.path, "fingerprint": source.fingerprint, "weight": spec.weight, "streaming": True}
            for spec, source in zip(specs, origins, strict=True)
        ]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        index = 0
        for source, record in self._records():
            try:
                item = self._item(source, source.to_sample(record))
            except SampleError as error:
                if self.on_bad_sample == "error":
                    raise WorkerError(bad_record(record["id"], error)) from None
                note(self.report, error.kind, record["id"], error.text)
                continue
            yield {**item, "index": index}
            index += 1

    def _records(self) -> Iterator[tuple[Source, dict[str, Any]]]:
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

    def _item(self, source: Source, sample: Sample) -> dict[str, Any]:
        encoder, row = self.encoder, self.encoder.encode(sample, source.roots)
        if row["shortened"]:
            note(self.report, "shortened", sample.id, row["detail"])
        grids = row["grids"]  # shortening may have dropped the last pictures
        counts = image_tokens(encoder.tokens_per_image, grids)
        ids, labels = expand(np.array(row["input_ids"]), np.array(row["labels"]), encoder.image_token, counts)
        images = [
            open_image(image, source.roots, draft=draft_size(self.draft, grid))
            for image, grid in zip(sample.images, grids, strict=False)
        ]
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            **picture_inputs(self.pixels, images, grids if encoder.tiles else None),
        }
