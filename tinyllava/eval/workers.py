"""Share an evaluation between processes: `torchrun --nproc_per_node 4 -m tinyllava eval ...`.

A common counter says which chunk of questions is next, so a slow process takes fewer chunks. The processes wait for
each other before and after a task. The counter is in torchrun's store; everything else that they exchange is in files.
Without torchrun there is one process and no store.
"""

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
# A process may have to wait for the whole evaluation. If one process dies, torchrun ends the others at once.
WAIT_LIMIT = timedelta(days=7)


class Workers:
    """This process and the number of processes; one process alone has no store."""

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count, self.store = rank, count, store
        self.counters: dict[str, int] = {}  # used if there is no store

    @classmethod
    def from_environment(cls) -> "Workers":
        """Join the processes that torchrun started; without torchrun, this process alone."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        from torch.distributed import rendezvous

        store, rank, count = next(rendezvous("env://", timeout=WAIT_LIMIT))
        return cls(rank, count, store)

    @property
    def is_main(self) -> bool:
        """Whether this process scores and prints."""
        return self.rank == 0

    def add(self, name: str, number: int) -> int:
        """Add to a counter that all processes share; returns its new value."""
        if self.store is None:
            self.counters[name] = self.counters.get(name, 0) + number
            return self.counters[name]
        return self.store.add(name, number)

    def take(self, name: str, chunks: Sequence[T]) -> Iterator[T]:
        """Yield the elements of `chunks`, the same list in all processes, that no other process takes."""
        while (number := self.add(name, 1) - 1) < len(chunks):
            yield chunks[number]

    def meet(self, name: str) -> None:
        """Wait until all processes have called this with the same name."""
        if self.store is None:
            return
        if self.add(f"{name}: here", 1) == self.count:
            self.store.set(f"{name}: all", "")
        self.store.wait([f"{name}: all"], WAIT_LIMIT)
