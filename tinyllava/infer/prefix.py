"""Share prefixes between the rows of a batch, so that their keys and values are computed once.

All rows of a batch end in the same column. The last `new` columns of each row are computed for that row. The columns
before them are copied from the keys and values of its prefix. A row therefore has no gap, and everything that depends
on the distance between columns (a sliding window, ALiBi) is the same as for the row alone.

    question on A  [image A  ][image A  ][ what is  ][it?      ]     prefixes  [image A  ][image A  ][what]
    another one    [image A  ][image A  ][what      ][colour?  ]
    question on B             [image B  ][image B  ][and here?]                [image B  ][image B  ]
                                              -- new --

Shapes: B rows, U prefixes, H heads of keys, L positions, E width of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from tinyllava.infer.image_encoder import PromptSlice
from tinyllava.infer.prompts import Prompt

BLOCK = 16  # columns by which the buffers of keys and values grow
WORTH_SHARING = 0.75  # share only if at most this part of the positions is left: a second run of the LLM has a cost


class Sharing(NamedTuple):
    """A batch in two runs: the prefixes, then the last `new` columns of every row after its prefix."""

    prefixes: list[PromptSlice]
    owner: list[int]  # the number of each row's prefix
    new: int


def plan_sharing(prompts: Sequence[Prompt], least: int = 1) -> Sharing | None:
    """Plan which prompts share a prefix, so that the fewest positions are computed. None if that saves little.

    Candidates are prompts on the same images. At least the last `least` columns of a row are computed for it alone.
    """
    groups: dict[Any, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(key for key, _ in prompt.images), []).append(row)
    rest = []  # for each group, the number of columns after the common ids of its rows
    for rows in groups.values():
        common = _count_common([prompts[row].ids for row in rows]) if len(rows) > 1 else 0
        longest = max(prompts[row].length for row in rows)
        rest.append(max(least, longest - common))
    plans = [_make_plan(prompts, list(groups.values()), rest, new) for new in sorted({*rest})]
    best = min(plans, key=lambda plan: _count_positions(plan, len(prompts)))
    padded = len(prompts) * max(prompt.length for prompt in prompts)
    return best if best.prefixes and _count_positions(best, len(prompts)) < WORTH_SHARING * padded else None


def _count_common(lists: list[list[int]]) -> int:
    """The number of leading ids that all lists have in common."""
    # The first and the last in sorted order: the ids that these two share are common to all lists between them.
    first, last = min(lists), max(lists)
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _make_plan(prompts: Sequence[Prompt], groups: list[list[int]], rest: list[int], new: int) -> Sharing:
    """One prefix for each group whose rows differ only in the last `new` columns, and one per row in other groups."""
    prefixes, owner = [], [0] * len(prompts)
    for rows, differing in zip(groups, rest, strict=True):
        for members in [rows] if differing <= new else [[row] for row in rows]:
            longest = max((prompts[row] for row in members), key=lambda prompt: prompt.length)
            for row in members:
                owner[row] = len(prefixes)
            prefixes.append(PromptSlice(longest, 0, max(0, longest.length - new)))
    return Sharing(prefixes if any(piece.stop for piece in prefixes) else [], owner, new)


def _count_positions(plan: Sharing, rows: int) -> int:
    return sum(piece.stop for piece in plan.prefixes) + rows * plan.new


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer [B, H, L, E], in a buffer with free columns at its end.

    A step writes only one column. transformers' own layer copies all columns at every step.
    """

    buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns and return all keys and values."""
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
        self.set_length(after)
        return self.keys, self.values

    def set_length(self, columns: int) -> None:
        """Use the first `columns` columns of the buffers."""
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self.buffers)


def make_cache() -> Cache:
    """An empty cache that keeps every column of every layer. The attention mask applies sliding windows."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def spread_cache(prefixes: Cache, owner: Tensor, lengths: Tensor, new: int) -> Cache:
    """The cache of a batch: row b ends with the first `lengths[b]` columns of prefix `owner[b]`.

    The columns to their left are padding with arbitrary numbers. To their right there is room for `new` columns.
    """
    width, count = int(lengths.max()), prefixes.get_seq_length()
    columns = torch.arange(width + new, device=lengths.device) - (width - lengths)[:, None]
    columns = columns.clamp(0, count - 1)  # [B, L]

    def spread(states: Tensor) -> Tensor:
        heads = torch.arange(states.shape[1], device=lengths.device)
        # [B, H]: the index in [U * H * L, E] at which a head of a row's prefix begins.
        first = (owner[:, None] * len(heads) + heads) * count
        index = (first[:, :, None] + columns[:, None]).flatten()
        return states.flatten(0, 2).index_select(0, index).unflatten(0, (len(owner), len(heads), -1))

    cache = make_cache()
    for number, layer in enumerate(prefixes.layers):
        cache.update(spread(layer.keys), spread(layer.values), number)
        cache.layers[number].set_length(width)
    return cache
