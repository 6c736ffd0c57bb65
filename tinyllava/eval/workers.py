"""The processes of one evaluation: `torchrun --nproc_per_node 4 -m tinyllava eval ...`, or one without torchrun.

They take chunks of questions from one counter, so that a slow process takes fewer, and meet before and after. The
counter lies in the store that torchrun keeps for its processes; nothing else passes between them but files.
"""

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # a process may wait for as long as another answers; torchrun ends all when one dies


class Workers:
    """This process and how many there are; alone unless it is told of a store."""

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count, self.store = rank, count, store
        self.counters: dict[str, int] = {}  # of a process alone

    @classmethod
    def from_environment(cls) -> "Workers":
        """The processes that torchrun has started."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        from torch.distributed import rendezvous

        store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
        return cls(rank, count, store)

    @property
    def is_main(self) -> bool:
        """Whether this process scores and talks to the user."""
        return self.rank == 0

    def add(self, name: str, number: int) -> int:
        """Add to a counter of all processes and return it."""
        if self.store is None:
            self.counters[name] = self.counters.get(name, 0) + number
            return self.counters[name]
        return self.store.add(name, number)

    def take(self, name: str, things: Sequence[T]) -> Iterator[T]:
        """Those of `things`, the same in all processes, that no other process takes."""
        while (at := self.add(name, 1) - 1) < len(things):
            yield things[at]

    def meet(self, name: str) -> None:
        """Wait until all processes are here."""
        if self.store is None:
            return
        if self.add(f"{name}: here", 1) == self.count:
            self.store.set(f"{name}: all", "")
        self.store.wait([f"{name}: all"], PATIENCE)
