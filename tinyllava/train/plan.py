"""One planner decides who trains on what.

    samples --shuffle--> optimiser steps of `global_batch_size` --by length--> micro-batches --by cost--> ranks

A step's samples depend on nothing but seed, epoch and step number, so accumulation, padding, grouping and the number
of devices are only ways to run the same step, and resuming is an index. Pure numpy; tests/train/test_plan.py is its
specification.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from tinyllava.errors import UserError

# Steps smaller than this are cut from windows of so many shuffled samples, sorted by length: 16 random conversations
# are a third padding. Larger steps have neighbours in length of their own.
WINDOW = 256


class Plan:
    """Which samples each rank runs in each micro-batch.

    lengths: positions of each sample after image expansion. A step's micro-batches hold samples of similar length;
    every rank has the same number of them. `order` (a list of sample indices) replaces the shuffle, for parity runs
    and debugging.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        global_batch_size: int,
        micro_batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        order: Sequence[int] | None = None,
    ):
        share, rest = divmod(global_batch_size, world_size * micro_batch_size)
        if rest or not share:
            raise UserError(
                f"global_batch_size {global_batch_size} is not a multiple of {world_size} device(s) x"
                f" per_device_train_batch_size {micro_batch_size}. Change one of them."
            )
        if not len(lengths):
            raise UserError("there are no samples to train on.")
        self.lengths = np.asarray(lengths)
        self.global_batch_size, self.micro_batch_size, self.world_size = global_batch_size, micro_batch_size, world_size
        self.accumulation = share
        self.seed, self.order = seed, order

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch; the last one may be smaller."""
        return -(-len(self.lengths) // self.global_batch_size)

    def step(self, epoch: int, step: int) -> np.ndarray:
        """The samples of one optimiser step."""
        return self.permutation(epoch)[step * self.global_batch_size : (step + 1) * self.global_batch_size]

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of all samples in an epoch: a shuffle, in which small steps trade samples to be of similar
        length.
        """
        if self.order is not None:
            return np.asarray(self.order)
        rng = np.random.default_rng((self.seed, epoch))
        shuffled, size = rng.permutation(len(self.lengths)), self.global_batch_size
        window = WINDOW // size * size
        if window <= size:
            return shuffled
        traded = []
        for start in range(0, len(shuffled), window):
            near = shuffled[start : start + window]
            near = near[np.lexsort((near, self.lengths[near]))]
            whole = len(near) // size * size
            steps = near[:whole].reshape(-1, size)
            traded += [steps[rng.permutation(len(steps))].ravel(), near[whole:]]
        return np.concatenate(traded)

    def micro_batches(self, samples: np.ndarray) -> list[list[list[int]]]:
        """A step's samples as [rank][micro-batch][sample].

        No micro-batch is empty: ~index (a negative number) stands for a sample that is run with nothing supervised.

        Neighbours in length share a micro-batch. In each round the ranks' micro-batches are neighbours too, so that no
        rank waits long for another, and the costliest goes to the rank that has had the least.
        """
        size, ranks = self.micro_batch_size, self.world_size
        rounds = -(-len(samples) // (size * ranks))
        ordered = samples[np.lexsort((samples, self.lengths[samples]))[::-1]]
        groups = [group.tolist() for group in np.array_split(ordered, rounds * ranks)]
        groups = [group or [int(~samples[0])] for group in groups]
        cost = [len(group) * max(self.lengths[index if index >= 0 else ~index] for index in group) for group in groups]
        plan: list[list[list[int]]] = [[] for _ in range(ranks)]
        spent = np.zeros(ranks)
        for start in range(0, len(groups), ranks):
            free = list(np.argsort(spent, kind="stable"))
            for index in sorted(range(start, start + ranks), key=lambda index: -cost[index]):
                rank = free.pop(0)
                plan[rank].append(groups[index])
                spent[rank] += cost[index]
        return plan

    def epoch(self, epoch: int, rank: int = 0) -> Iterator[list[int]]:
        """The micro-batches of one rank through an epoch."""
        order = self.permutation(epoch)
        for start in range(0, len(order), self.global_batch_size):
            yield from self.micro_batches(order[start : start + self.global_batch_size])[rank]

    def batches_per_epoch(self) -> int:
        """Micro-batches of one rank in an epoch."""
        whole, rest = divmod(len(self.permutation(0)), self.global_batch_size)
        return whole * self.accumulation + -(-rest // (self.micro_batch_size * self.world_size))

    def padding(self, epochs: int = 1) -> float:
        """Share of positions that are padding."""
        used = padded = 0
        for epoch in range(epochs):
            for rank in range(self.world_size):
                for batch in self.epoch(epoch, rank):
                    lengths = self.lengths[[index if index >= 0 else ~index for index in batch]]
                    used, padded = used + int(lengths.sum()), padded + int(lengths.max()) * len(batch)
        return 1.0 - used / padded if padded else 0.0


class PlannedBatches:
    """A plan as the batch sampler of a DataLoader: one rank's micro-batches of the current epoch."""

    def __init__(self, plan: Plan, rank: int = 0):
        self.plan, self.rank, self._epoch = plan, rank, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer (through the loader) at the start of each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return self.plan.epoch(self._epoch, self.rank)

    def __len__(self) -> int:
        return self.plan.batches_per_epoch()
