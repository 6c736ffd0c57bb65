"""Running a vision tower only as far as its features need, and its layers by name.

Shapes: I images, N tower tokens, Dv tower width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest

import torch
from torch import Tensor, nn

from tinyllava.vision_towers import size_options


def find_blocks(module: nn.Module) -> list[str]:
    """Names of the repeated layers of a tower or an LLM, in order: its longest list of modules of one class.

    Those of a mixture take turns, last beside last: its last four are the last two of each tower.
    """
    if hasattr(module, "members"):
        towers = ([f"{name}.{block}" for block in find_blocks(tower)] for name, tower in module.named_children())
        levels = zip_longest(*(reversed(blocks) for blocks in towers))
        return [block for level in levels for block in reversed(level) if block][::-1]
    lists = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len({type(layer) for layer in child}) == 1
    ]
    if not lists:
        return []
    name, blocks = max(lists, key=lambda item: len(item[1]))
    return [f"{name}.{index}" for index in range(len(blocks))]


class _Reached(Exception):
    """Raised inside a frozen tower when the wanted hidden state exists; nothing above it needs to run."""


@contextmanager
def _stopping(blocks: dict[int, nn.Module], found: dict[int, Tensor]) -> Iterator[None]:
    """Put what comes into each of the blocks into `found`, and end the forward at the highest."""

    def hook_at(index: int):
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            found[index] = args[0] if args else kwargs["hidden_states"]
            if index == max(blocks):
                raise _Reached

        return hook

    handles = [block.register_forward_pre_hook(hook_at(index), with_kwargs=True) for index, block in blocks.items()]
    try:
        yield
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()


def states_at(tower: nn.Module, pixel_values: Tensor, indices: list[int], whole: bool) -> list[Tensor]:
    """Hidden states `indices` of a tower (0: embeddings, k: output of layer k): [I, 3, H, W] -> [I, N, Dv] each.

    Unless `whole`, nothing above the highest is run. A mixture gives one: its towers' patches, joined on channels.
    """
    if hasattr(tower, "members"):
        features = [
            torch.cat([state[:, prefix:] for state in states_at(member, pixels, own, whole)], dim=-1)
            for member, pixels, own, prefix in tower.members(pixel_values, indices)
        ]
        return [torch.cat(features, dim=-1)]
    options = size_options(tower.config, pixel_values)
    if not whole and max(indices) < tower.config.num_hidden_layers:
        names, found = find_blocks(tower), {}
        with _stopping({index: tower.get_submodule(names[index]) for index in indices}, found):
            tower(pixel_values, **options)
        return [found[index] for index in indices]
    hidden_states = tower(pixel_values, output_hidden_states=True, **options).hidden_states
    return [hidden_states[index] for index in indices]
