"""Feed the micro-batches of a plan to torch's DataLoader, for data with known lengths and for streams."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tinyllava.data.dataset import SupervisedDataset
from tinyllava.data.labels import IGNORE
from tinyllava.data.streaming import StreamingDataset
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


class PlannedStream(IterableDataset):
    """A stream planned in windows of one optimiser step. Every rank reads all of it and takes its own micro-batches."""

    def __init__(
        self, dataset: StreamingDataset, size: int, micro: int, world: int, rank: int, collate: Callable[[list], dict]
    ) -> None:
        """size: samples of a step, the global batch. micro: of a micro-batch. world: the number of ranks."""
        self.dataset, self.rank, self.collate, self.shape = dataset, rank, collate, (size, micro, world)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Passes over the stream without an end: a run resumes by skipping steps, also those of earlier passes."""
        has_steps, size = True, self.shape[0]
        while has_steps:
            has_steps, window = False, []
            for item in self.dataset:
                window.append(item)
                # An incomplete last window is left out, because its ranks would have unequal shares.
                if len(window) == size:
                    lengths = [len(sample["input_ids"]) for sample in window]
                    plan = Plan(lengths, *self.shape, order=range(size))
                    for batch in plan.iterate_epoch(0, self.rank):
                        yield self.collate([window[entry.sample] for entry in batch])
                    has_steps, window = True, []
