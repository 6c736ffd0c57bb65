"""Lanes: a stream is dealt out to as many lanes as a step has samples, and the n-th sample of a step is of lane n.

Nothing here depends on who reads: a rank and its worker processes read only their lanes, and a run on other ranks and
workers has the same steps. A lane goes through a source pass by pass and never ends, so no weight changes and no tail
is lost.

Shards of a source (files, row groups) are dealt out to groups of lanes, the records of a shard to the lanes of a group.
The lanes of a group that are in one process share its reading. A group reads a block of records, shuffles it, and deals
it out. A place is the first record of a block and how many of its records the lane used: a few numbers, from which a
run resumes without reading again what came before the block.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np

from tinyllava.errors import WorkerError

SHUFFLED = 1000  # records in the blocks of all lanes: with their encoded images, about a hundred MB
QUEUED = 4 * SHUFFLED  # records that wait in a reading for the slower of its lanes
MOST_GROUPS = 64  # each has a file open, and a row group of images may have 100 MB
EVEN = 16  # shards of a group from which one more or less does not matter: 6 %
TRIED = 100  # bad records of a lane in a row, after which it does not wait for later passes


class ShardedSource(Protocol):
    """What is dealt out: records in shards, such as files. A raw row becomes a record only where a lane takes it."""

    path: str

    def count_shards(self) -> int:
        """The number of shards."""

    def iterate_shard(self, shard: int, start: int) -> Iterator[Any]:
        """The raw rows of a shard, from the row `start` on."""

    def to_record(self, row: Any, shard: int, index: int) -> dict[str, Any]:
        """The record of the raw row `index` of a shard."""


class Place(NamedTuple):
    """Where a lane is in a source: in which pass, at which shard and row its block begins, and how much it used."""

    turn: int = 0  # the number of the pass
    shard: int = 0  # in the order of this pass
    row: int = 0
    used: int = 0


class Reading:
    """One pass of a group over its shards, from a place on, for the lanes of the group that are in this process."""

    def __init__(
        self, source: ShardedSource, shards: Sequence[int], start: Place, seed: Sequence[int], lanes: int
    ) -> None:
        """lanes: the number of lanes of the group, also of those in other processes."""
        self.source, self.shards, self.seed, self.lanes, self.turn = source, shards, seed, lanes, start.turn
        self.rows = self._iterate_rows(start)
        self.queues: dict[int, deque[tuple[Place, dict[str, Any]]]] = {}
        self.joined: dict[int, tuple[int, Place]] = {}  # {lane: (its slot among the lanes of the group, its place)}

    def deal(self, size: int) -> bool:
        """Read a block of up to `size` records and deal it out. False at the end of the pass."""
        block = list(islice(self.rows, size))
        if not block:
            return False
        shard, row, _ = block[0]
        mixed = np.random.default_rng((*self.seed, self.turn, shard, row)).permutation(len(block))
        for lane, (slot, start) in self.joined.items():
            for used, at in enumerate(mixed[slot :: self.lanes]):
                if Place(self.turn, shard, row, used) >= start:
                    number, index, raw = block[at]
                    record = self.source.to_record(raw, self.shards[number], index)
                    self.queues[lane].append((Place(self.turn, shard, row, used + 1), record))
        return True

    def _iterate_rows(self, start: Place) -> Iterator[tuple[int, int, Any]]:
        """(shard in the order of this pass, row in it, raw row), without converting the row."""
        for number in range(start.shard, len(self.shards)):
            first = start.row if number == start.shard else 0
            for row, raw in enumerate(self.source.iterate_shard(self.shards[number], first), first):
                yield number, row, raw


class Dealer:
    """One source for the lanes of this process."""

    def __init__(
        self, source: ShardedSource, seed: Sequence[int], lanes: Sequence[int], total: int, places: dict[int, Place]
    ) -> None:
        """lanes: those of this process, of `total`. places: where each of them is. One without a place begins."""
        self.source, self.seed, self.lanes, self.total = source, seed, lanes, total
        self.places = {lane: places.get(lane, Place()) for lane in lanes}
        count = source.count_shards()
        fitting = (n for n in range(1, MOST_GROUPS + 1) if total % n == 0)
        # Groups with unequal numbers of shards would begin their next passes at different times.
        self.groups = max((n for n in fitting if count % n == 0 or count >= EVEN * n), default=1)
        self.order = np.random.default_rng(seed).permutation(count)
        self.readings: dict[tuple[int, int], Reading] = {}  # by lane and pass

    def take(self, lane: int, make: Callable[[dict[str, Any]], Any]) -> Any:
        """The next item of a lane. `make` makes it of a record, or returns None for a bad one, which is passed over.

        Raises WorkerError when the lane finds none.
        """
        first, bad = self.places[lane].turn, 0
        # In each pass a lane has the records of another lane, and after `total` passes it has had them all.
        # Where some are bad, it may have had the same ones again.
        while (turns := self.places[lane].turn - first) <= self.total * (16 if bad else 1):
            if turns > 1 and bad >= TRIED:
                break
            place = self.places[lane]
            reading = self.readings.get((lane, place.turn)) or self._open(lane, place.turn)
            if queue := reading.queues[lane]:
                self.places[lane], record = queue.popleft()
                if (item := make(record)) is not None:
                    return item
                bad += 1
            elif reading.deal(-(-SHUFFLED // self.total) * reading.lanes):
                self._limit(reading)
            else:
                del self.readings[lane, place.turn]
                self.places[lane] = Place(place.turn + 1)
        raise WorkerError(f"{self.source.path} has no usable record: {bad} bad ones in {turns} passes of a lane.")

    def _open(self, lane: int, turn: int) -> Reading:
        """A reading of this pass, for this lane and for all others of its group that have none and can join it."""
        lanes, group = self.total // self.groups, lane % self.groups
        peers = [each for each in self.lanes if each % self.groups == group and (each, turn) not in self.readings]
        start = min(self.places[each] for each in peers if self.places[each].turn == turn)
        mine = self.order[(group + turn) % self.groups :: self.groups]
        shards = np.random.default_rng((*self.seed, turn, group)).permutation(mine)
        reading = Reading(self.source, shards.tolist(), start, (*self.seed, group), lanes)
        for each in peers:
            place = max(self.places[each], Place(turn))  # those in an earlier pass will come
            if place.turn == turn and place[:3] >= start[:3]:
                reading.queues[each], self.readings[each, turn] = deque(), reading
                reading.joined[each] = (each // self.groups + turn) % lanes, place
        return reading

    def _limit(self, reading: Reading) -> None:
        """Part with the slowest lanes if too many records wait for them: they will open a reading of their own."""
        while sum(map(len, reading.queues.values())) > QUEUED + 2 * reading.lanes:  # more than a block
            slowest = max(reading.queues, key=lambda lane: len(reading.queues[lane]))
            del reading.queues[slowest], reading.joined[slowest], self.readings[slowest, reading.turn]
