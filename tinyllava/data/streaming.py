"""StreamingDataset: the same items and checks as SupervisedDataset, one after another, for data too large to keep.

Their lengths and their number are not known in advance. Its samples come in steps of one global batch (see lanes.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from tinyllava.config import DataSpec
from tinyllava.data.bad_records import SHORTENED, BadRecords, describe_bad_record
from tinyllava.data.collate import make_image_inputs
from tinyllava.data.encode import Encoder, expand
from tinyllava.data.images import open_image
from tinyllava.data.options import DataOptions
from tinyllava.data.sample import Sample, SampleError
from tinyllava.data.sources import Source
from tinyllava.data.tiles import count_image_tokens, to_draft_size
from tinyllava.errors import UserError, WorkerError
from tinyllava.lanes import Dealer, Place

Places = dict[tuple[int, int], Place]  # {(lane, source): where the lane is in the source}
# Fractions of 2**64 by which a lane's choice of a source moves from step to step, and a step's from lane to lane: the
# golden ratio and the root of 2. Multiples of such numbers are spread as evenly as can be, in both directions.
BY_STEP, BY_LANE = 0x9E3779B97F4A7C15, 0x6A09E667F3BCC908


class StreamingDataset(torch.utils.data.IterableDataset):
    """A stream without an end of items like those of SupervisedDataset.

    Several sources are mixed by their weights: so evenly that lanes and steps have them in proportion. A bad record is
    replaced by the next one of its lane and source, and counted in `bad_records`. ids: those of the samples of the
    latest steps, by index.
    """

    def __init__(
        self, specs: Sequence[DataSpec], origins: list[Source], encoder: Encoder, options: DataOptions
    ) -> None:
        if mapped := [spec.path for spec, source in zip(specs, origins, strict=True) if not source.streaming]:
            raise UserError(
                f"{mapped[0]} does not stream but others do. Set `streaming: true` for all data of a stage, or none."
            )
        self.origins, weights = origins, np.array([spec.weight for spec in specs])
        self.shares = np.cumsum(weights / weights.sum())
        self.encoder, self.pixels, self.draft = encoder, options.pixels, options.draft
        self.on_bad_sample, self.seed = options.on_bad_sample, options.seed
        self.bad_records, self.ids = BadRecords(), {}
        self.start = int(np.random.default_rng(options.seed).integers(2**63))  # of the choices of sources
        common = {"streaming": True, "tokenised": encoder.hash_options()}  # what decides the tokens of a record
        self.sources = [
            {"path": spec.path, "fingerprint": source.fingerprint, "files": source.key, "weight": spec.weight, **common}
            | {"shards": source.count_shards()}
            for spec, source in zip(specs, origins, strict=True)
        ]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for items in self.iterate_steps([0], 1):
            self.receive(items)
            yield items[0]

    def iterate_steps(
        self, lanes: Sequence[int], total: int, places: Mapping[tuple[int, int], Place] | None = None, step: int = 0
    ) -> Iterator[list[dict[str, Any]]]:
        """The items of these lanes, of `total`, in every step from `step` on. places: where the lanes are.

        Each item also has its "id", the "place" of its lane after it, and the bad records "dropped" before it.
        `receive` takes them out, in the process that trains.
        """
        dealers = []
        for number, source in enumerate(self.origins):
            here = {lane: place for (lane, other), place in (places or {}).items() if other == number}
            dealers.append(Dealer(source, (self.seed, number), lanes, total, here))
        while True:
            items = []
            for lane in lanes:
                number = self.choose_source(step, lane)
                dropped: list[tuple[str, str, str]] = []
                item = dealers[number].take(lane, partial(self._make_item, self.origins[number], dropped))
                place = lane, number, dealers[number].places[lane]
                items.append({**item, "index": step * total + lane, "place": place, "dropped": dropped})
            yield items
            step += 1

    def choose_source(self, step: int, lane: int) -> int:
        """The source from which a lane takes its sample of a step."""
        chosen = (self.start + step * BY_STEP + lane * BY_LANE) % 2**64 / 2**64
        return min(int(np.searchsorted(self.shares, chosen, side="right")), len(self.shares) - 1)

    def receive(self, items: list[dict[str, Any]], places: Places | None = None) -> None:
        """Take the items of a step over from the process that made them: note their ids, places and bad records."""
        known = [*self.ids.items(), *((item["index"], item["id"]) for item in items)]
        self.ids = dict(known[-64 * len(items) :])  # of 64 steps, for messages about their losses
        for item in items:
            lane, number, place = item.pop("place")
            if places is not None:
                places[lane, number] = place
            for bad in item.pop("dropped"):
                self.bad_records.add(*bad)

    def _make_item(self, source: Source, dropped: list, record: dict[str, Any]) -> dict[str, Any] | None:
        """The item of a raw record; None for a bad one, which is added to `dropped`."""
        try:
            return self._encode(source, source.to_sample(record), dropped)
        except SampleError as error:
            if self.on_bad_sample == "error":
                raise WorkerError(describe_bad_record(record["id"], error)) from None
            dropped.append((error.kind, record["id"], error.text))
            return None

    def _encode(self, source: Source, sample: Sample, dropped: list) -> dict[str, Any]:
        encoder, row = self.encoder, self.encoder.encode(sample, source.roots)
        if row["shortened"]:
            dropped.append((SHORTENED, sample.id, row["detail"]))
        grids = row["grids"]  # shortening may have dropped the last images
        counts = count_image_tokens(encoder.tokens_per_image, grids)
        ids, labels = expand(np.array(row["input_ids"]), np.array(row["labels"]), encoder.image_token, counts)
        kept = zip(sample.images, grids, strict=False)
        images = [open_image(image, source.roots, draft=to_draft_size(self.draft, grid)) for image, grid in kept]
        return {
            "id": sample.id,
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            **make_image_inputs(self.pixels, images, grids if encoder.tiles else None),
        }
