"""What of a batch is computed once: prefixes that several rows share, and the keys and values made from them.

All rows of a batch end in the same column, and the last `new` columns of each are computed for itself; what lies before
them is taken, column by column, from the keys and values of its prefix. So a row has no gap, and whatever the LLM makes
of distances between columns (a sliding window, ALiBi) is what it makes of them alone.

    question on A  [picture A][picture A][ what is  ][it?      ]     prefixes  [picture A][picture A][what]
    another one    [picture A][picture A][what      ][colour?  ]
    question on B             [picture B][picture B][and here?]                [picture B][picture B]
                                              -- new --

Shapes: B rows, U prefixes, H heads of keys, L positions, E width of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from tinyllava.data.prompts import Prompt
from tinyllava.infer.pictures import Piece

BLOCK = 16  # columns that keys and values grow by
WORTH_IT = 0.75  # of the positions: saving less is not worth a second run


class Sharing(NamedTuple):
    """A batch in two runs: prefixes, then the last `new` columns of every row after the prefix that is its own."""

    prefixes: list[Piece]
    owner: list[int]  # of each row: which prefix
    new: int


def share(prompts: Sequence[Prompt], least: int = 1) -> Sharing | None:
    """How the prompts share their prefixes with the fewest positions computed; None where nothing much is saved.

    Candidates are prompts on the same pictures. At least the last `least` columns of a row are its own.
    """
    groups: dict[Any, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(key for key, _ in prompt.images), []).append(row)
    rest = []  # of each group: the columns after what all its rows have in common
    for rows in groups.values():
        common = _common([prompts[row].ids for row in rows]) if len(rows) > 1 else 0
        longest = max(prompts[row].length for row in rows)
        rest.append(max(least, longest - common))
    plans = [_plan(prompts, list(groups.values()), rest, new) for new in sorted({*rest})]
    best = min(plans, key=lambda plan: _cost(plan, len(prompts)))
    padded = len(prompts) * max(prompt.length for prompt in prompts)
    return best if best.prefixes and _cost(best, len(prompts)) < WORTH_IT * padded else None


def _common(lists: list[list[int]]) -> int:
    """With how many equal numbers all lists begin."""
    first, last = min(lists), max(lists)  # what these two share, all that lie between them share
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _plan(prompts: Sequence[Prompt], groups: list[list[int]], rest: list[int], new: int) -> Sharing:
    """Groups that differ in their last `new` columns alone have one prefix; of the others each row has its own."""
    prefixes, owner = [], [0] * len(prompts)
    for rows, differing in zip(groups, rest, strict=True):
        for members in [rows] if differing <= new else [[row] for row in rows]:
            longest = max((prompts[row] for row in members), key=lambda prompt: prompt.length)
            for row in members:
                owner[row] = len(prefixes)
            prefixes.append(Piece(longest, 0, max(0, longest.length - new)))
    return Sharing(prefixes if any(piece.stop for piece in prefixes) else [], owner, new)


def _cost(plan: Sharing, rows: int) -> int:
    return sum(piece.stop for piece in plan.prefixes) + rows * plan.new


class Columns(DynamicLayer):
    """Keys and values of one layer [B, H, L, E] in a buffer with room at its end: a step writes its column and copies
    no other, where transformers' own layer copies everything."""

    buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self.buffers is None or len(self.buffers[0]) != len(key_states) or self.buffers[0].shape[-2] < after:
            shape = (*key_states.shape[:2], after + BLOCK)
            buffers = tuple(states.new_empty(*shape, states.shape[-1]) for states in (key_states, value_states))
            if before:
                buffers[0][:, :, :before], buffers[1][:, :, :before] = self.keys, self.values
            self.buffers = buffers
        self.buffers[0][:, :, before:after], self.buffers[1][:, :, before:after] = key_states, value_states
        self.show(after)
        return self.keys, self.values

    def show(self, columns: int) -> None:
        """Take so many columns of the buffers for keys and values."""
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self.buffers)

    @classmethod
    def of(cls, buffers: tuple[Tensor, Tensor], columns: int) -> "Columns":
        """A layer with these buffers, of which so many columns are made."""
        layer = cls()
        layer.lazy_initialization(*buffers)
        layer.buffers = buffers
        layer.show(columns)
        return layer


def new_cache() -> Cache:
    """An empty cache that keeps every column of every layer; windows slide by mask."""
    return Cache(layer_class_to_replicate=Columns)


def spread_cache(prefixes: Cache, owner: Tensor, lengths: Tensor, new: int) -> Cache:
    """The first columns of a batch: row b ends with the first `lengths[b]` columns of prefix `owner[b]`.

    What lies left of them is padding, and holds whatever numbers; right of them there is room for `new` columns.
    """
    width, count = int(lengths.max()), prefixes.get_seq_length()
    columns = torch.arange(width + new + BLOCK, device=lengths.device) - (width - lengths)[:, None]
    columns = columns.clamp(0, count - 1)  # [B, L]

    def spread(states: Tensor) -> Tensor:
        heads = torch.arange(states.shape[1], device=lengths.device)
        first = (
            owner[:, None] * len(heads) + heads
        ) * count  # [B, H]: where a head of a prefix begins in [U * H * L, E]
        index = (first[:, :, None] + columns[:, None]).flatten()
        return states.flatten(0, 2).index_select(0, index).unflatten(0, (len(owner), len(heads), -1))

    made = new_cache()
    made.layers = [Columns.of((spread(layer.keys), spread(layer.values)), width) for layer in prefixes.layers]
    return made
