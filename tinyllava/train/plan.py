"""Plan which samples each rank trains on, in which micro-batch and optimiser step.

    samples --shuffle--> optimiser steps of `global_batch_size` --by length--> micro-batches --by cost--> ranks

The samples of a step depend only on the data, `global_batch_size`, seed, epoch and step number. Accumulation, padding,
grouping and the number of devices do not change them, and a run resumes at the index of a step. The first two steps
hold the longest samples: a run that needs too much memory fails then, not hours later. (The second step is the first
one with the optimiser's states.) Pure numpy. tests/train/test_plan.py is the specification.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tinyllava.errors import UserError

# Smaller steps are cut from windows of about this many shuffled samples, which are sorted by length: in a batch of 16
# random conversations, a third of the positions is padding. Larger steps hold enough samples of similar length.
WINDOW = 256


class Entry(NamedTuple):
    """One place in a micro-batch. A filler is a sample that is run but not trained on."""

    sample: int
    is_filler: bool = False


@dataclass
class Plan:
    """Which samples each rank runs in each micro-batch.

    lengths: positions of each sample after image expansion. A micro-batch holds samples of similar length; every rank
    has the same number of micro-batches. order: a list of sample indices that replaces the shuffle, for parity runs and
    debugging. longest_first: whether the longest samples of the first epoch come first, if no order is given.
    """

    lengths: Sequence[int] | np.ndarray
    global_batch_size: int
    micro_batch_size: int
    world_size: int = 1
    seed: int = 0
    order: Sequence[int] | None = None
    longest_first: bool = False

    def __post_init__(self) -> None:
        self.accumulation, rest = divmod(self.global_batch_size, self.world_size * self.micro_batch_size)
        if rest or not self.accumulation:
            raise UserError(
                f"global_batch_size {self.global_batch_size} is not a multiple of {self.world_size} device(s) x"
                f" per_device_train_batch_size {self.micro_batch_size}. Change one of them."
            )
        if not len(self.lengths):
            raise UserError("there are no samples to train on.")
        self.lengths = np.asarray(self.lengths)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of one rank in an epoch."""
        whole, rest = divmod(len(self.shuffle(0)), self.global_batch_size)
        return whole * self.accumulation + -(-rest // (self.micro_batch_size * self.world_size))

    def shuffle(self, epoch: int) -> np.ndarray:
        """The order of all samples in an epoch. Small steps exchange samples, so that each holds similar lengths."""
        if self.order is not None:
            return np.asarray(self.order)
        rng = np.random.default_rng((self.seed, epoch))
        shuffled, size = rng.permutation(len(self.lengths)), self.global_batch_size
        window, exchanged = WINDOW // size * size, []
        if window <= size:
            return self.move_longest(shuffled) if self.longest_first and not epoch else shuffled
        for start in range(0, len(shuffled), window):
            near = shuffled[start : start + window]
            # By length, then by index, so that the order never depends on the sorting algorithm.
            near = near[np.lexsort((near, self.lengths[near]))]
            whole = len(near) // size * size
            steps = near[:whole].reshape(-1, size)
            exchanged += [steps[rng.permutation(len(steps))].ravel(), near[whole:]]
        order = np.concatenate(exchanged)
        return self.move_longest(order) if self.longest_first and not epoch else order

    def move_longest(self, order: np.ndarray) -> np.ndarray:
        """The order in which the longest sample is in step 0, and the longest of the other steps in step 1.

        Whole steps change places. If the sample is in the incomplete last step, it first changes places with the
        longest sample of the whole steps: a short step would not show the memory of a full one.
        """
        size, order = self.global_batch_size, order.copy()
        for step in range(min(2, len(order) // size)):
            later, first = self.lengths[order][step * size :], step * size
            whole = len(later) // size * size
            longest, other = first + int(later.argmax()), first + int(later[:whole].argmax())
            order[[longest, other]] = order[[other, longest]]
            moved = np.arange(size) + other // size * size
            place = np.arange(size) + first
            order[place], order[moved] = order[moved], order[place]
        return order

    def split_step(self, samples: np.ndarray) -> list[list[list[Entry]]]:
        """The samples of a step as [rank][micro-batch][entry].

        All ranks have the same number of micro-batches, and none is empty: if there are too few samples, a filler takes
        the place. Samples of similar length share a micro-batch. In each round, the ranks' micro-batches also have
        similar lengths, so that no rank waits long for another. The most expensive micro-batch goes to the rank that
        had the least work.
        """
        ranks = self.world_size
        rounds = -(-len(samples) // (self.micro_batch_size * ranks))
        longest_first = samples[np.lexsort((samples, self.lengths[samples]))[::-1]]
        groups = [[Entry(int(sample)) for sample in group] for group in np.array_split(longest_first, rounds * ranks)]
        groups = [group or [Entry(int(samples[0]), is_filler=True)] for group in groups]
        cost = [len(group) * max(self.lengths[entry.sample] for entry in group) for group in groups]
        plan: list[list[list[Entry]]] = [[] for _ in range(ranks)]
        spent = np.zeros(ranks)
        for start in range(0, len(groups), ranks):
            idlest_first = list(np.argsort(spent, kind="stable"))
            for index in sorted(range(start, start + ranks), key=lambda index: -cost[index]):
                rank = idlest_first.pop(0)
                plan[rank].append(groups[index])
                spent[rank] += cost[index]
        return plan

    def iterate_epoch(self, epoch: int, rank: int = 0) -> Iterator[list[Entry]]:
        """The micro-batches of one rank through an epoch."""
        order = self.shuffle(epoch)
        for start in range(0, len(order), self.global_batch_size):
            yield from self.split_step(order[start : start + self.global_batch_size])[rank]
