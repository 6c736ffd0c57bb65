"""Run a vision tower only up to the layer that its features come from.

Shapes: I images, N tower tokens, Dv tower width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from tinyllava.model.modules import find_blocks
from tinyllava.vision_towers import CompositeTower, make_size_options


class _LayerReached(Exception):
    """Raised inside a frozen tower when the last needed hidden state exists: no layer above it has to run."""


@contextmanager
def _stop_early(blocks: dict[int, nn.Module], states: dict[int, Tensor]) -> Iterator[None]:
    """Store the input of each block in `states`, and end the forward at the highest block."""

    def store(index: int, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        states[index] = args[0] if args else kwargs["hidden_states"]
        if index == max(blocks):
            raise _LayerReached

    hooks = {block: partial(store, index) for index, block in blocks.items()}
    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block, hook in hooks.items()]
    try:
        yield
    except _LayerReached:
        pass
    finally:
        for handle in handles:
            handle.remove()


def compute_states(tower: nn.Module, pixel_values: Tensor, indices: list[int], whole: bool) -> list[Tensor]:
    """Hidden states `indices` of a tower (0: embeddings, k: output of layer k): [I, 3, H, W] -> [I, N, Dv] each.

    Unless `whole`, no layer above the highest of `indices` is run. A mixture returns one state: the patches of its
    towers, joined on channels.
    """
    if isinstance(tower, CompositeTower):
        features = [
            state[:, member.prefix_tokens :]
            for member in tower.split_inputs(pixel_values, indices)
            for state in compute_states(member.tower, member.pixel_values, member.indices, whole)
        ]
        return [torch.cat(features, dim=-1)]
    options = make_size_options(tower.config, pixel_values)
    if not whole and max(indices) < tower.config.num_hidden_layers:
        # Hidden state k is the input of block k, which counts from 0.
        names, states = find_blocks(tower), {}
        with _stop_early({index: tower.get_submodule(names[index]) for index in indices}, states):
            tower(pixel_values, **options)
        return [states[index] for index in indices]
    hidden_states = tower(pixel_values, output_hidden_states=True, **options).hidden_states
    return [hidden_states[index] for index in indices]
