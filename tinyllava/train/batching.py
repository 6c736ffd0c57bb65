"""Feed the micro-batches of a plan to torch's DataLoader, for data with known lengths and for streams."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tinyllava.data.dataset import SupervisedDataset
from tinyllava.data.labels import IGNORE
from tinyllava.data.streaming import Places, StreamingDataset
from tinyllava.errors import UserError
from tinyllava.files import read_json
from tinyllava.lanes import Place
from tinyllava.runs import REMEDY
from tinyllava.train.plan import Entry, Plan


class PlannedBatches:
    """A plan as the batch sampler of a DataLoader: one rank's micro-batches of the current epoch."""

    def __init__(self, plan: Plan, rank: int = 0) -> None:
        self.plan, self.rank, self.epoch = plan, rank, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer, through the loader, at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Entry]]:
        return self.plan.iterate_epoch(self.epoch, self.rank)

    def __len__(self) -> int:
        return self.plan.batches_per_epoch


class PlannedLoader(DataLoader):
    """A DataLoader that tells its batch sampler which epoch it is."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.batch_sampler.set_epoch(epoch)


class PlannedDataset(torch.utils.data.Dataset):
    """A dataset that is indexed by the entries of a plan. A filler is a sample with nothing supervised."""

    def __init__(self, dataset: SupervisedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, entry: Entry) -> dict[str, Any]:
        item = self.dataset[entry.sample]
        if entry.is_filler:
            item["labels"] = torch.full_like(item["labels"], IGNORE)
        return item


class StreamShare(IterableDataset):
    """A rank's lanes of a stream. Each worker process reads a part of them, and yields their items step by step."""

    def __init__(self, dataset: StreamingDataset, total: int, world: int, rank: int) -> None:
        """total: lanes of all ranks, which is the global batch."""
        self.dataset, self.total, self.lanes = dataset, total, range(rank, total, world)
        self.places: Places = {}
        self.step = 0  # of the run, where it starts

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        worker = get_worker_info()
        lanes = self.lanes[worker.id :: worker.num_workers] if worker else self.lanes
        return self.dataset.iterate_steps(lanes, self.total, self.places, self.step)


class StreamLoader(DataLoader):
    """A rank's micro-batches of a stream. It knows where its lanes are, for the checkpoint."""

    def __init__(
        self,
        dataset: StreamingDataset,
        size: int,
        micro: int,
        world: int,
        rank: int,
        collate: Callable[[list], dict],
        **kwargs: Any,
    ) -> None:
        """size: samples of a step, the global batch. micro: of a micro-batch. world: the number of ranks."""
        share = StreamShare(dataset, size, world, rank)
        self.share, self.micro, self.collate, self.pins = share, micro, collate, kwargs.pop("pin_memory")
        # A generator of its own: starting workers must not change the random numbers of the training.
        kwargs |= {"num_workers": min(kwargs["num_workers"], len(share.lanes)), "generator": torch.Generator()}
        super().__init__(share, batch_size=None, collate_fn=list, **kwargs)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Micro-batches without an end. Those of a step hold samples of similar length."""
        parts = super().__iter__()
        while True:
            items = [item for _ in range(max(1, self.num_workers)) for item in next(parts)]
            items.sort(key=lambda item: item["index"])  # whatever the number of workers is
            self.share.dataset.receive(items, self.share.places)
            lengths = [len(item["input_ids"]) for item in items]
            for batch in Plan(lengths, len(items), self.micro, order=range(len(items))).iterate_epoch(0):
                made = self.collate([items[entry.sample] for entry in batch])
                yield {name: tensor.pin_memory() for name, tensor in made.items()} if self.pins else made

    def save(self, directory: Path, rank: int) -> None:
        """Write where the lanes of this rank are after the last step."""
        places = [[*key, *place] for key, place in sorted(self.share.places.items())]
        (directory / f"stream-{rank}.json").write_text(json.dumps({"places": places}))

    def load(self, checkpoint: Path, step: int) -> None:
        """Continue after `step`, whatever the number of ranks was. Raises UserError if the places are not known."""
        rows = [row for file in checkpoint.glob("stream-*.json") for row in read_json(file)["places"]]
        places = {(lane, source): Place(*place) for lane, source, *place in rows}
        if missing := self.share.total - len({lane for lane, _ in places}):
            raise UserError(
                f"{checkpoint} does not say where {missing} of {self.share.total} lanes of the streamed data are. "
                f"An earlier version wrote it, or files are missing. {REMEDY}"
            )
        self.share.places = {key: place for key, place in places.items() if key[0] in self.share.lanes}
        self.share.step = step
