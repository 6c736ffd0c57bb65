"""Run a vision tower only up to the layer that its features come from.

Shapes: I images, N tower tokens, Dv tower width.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

import torch
from torch import Tensor, nn

from tinyllava.model.modules import find_blocks
from tinyllava.vision_towers import CompositeTower, make_size_options


class _LayerReached(Exception):
    """Raised inside a frozen tower when the last needed hidden state exists: no layer above it has to run."""


def _capture_inputs(tower: nn.Module, blocks: dict[int, str], run: Callable[[], object]) -> dict[int, Tensor]:
    """The input of each block while `run()` runs the tower, which ends at the highest block."""
    states: dict[int, Tensor] = {}

    def store(index: int, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        states[index] = args[0] if args else kwargs["hidden_states"]
        if index == max(blocks):
            raise _LayerReached

    with ExitStack() as hooks, suppress(_LayerReached):
        for index, name in blocks.items():
            hook = tower.get_submodule(name).register_forward_pre_hook(partial(store, index), with_kwargs=True)
            hooks.callback(hook.remove)
        run()
    return states


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
        names = find_blocks(tower)
        blocks = {index: names[index] for index in indices}
        states = _capture_inputs(tower, blocks, partial(tower, pixel_values, **options))
        return [states[index] for index in indices]
    hidden_states = tower(pixel_values, output_hidden_states=True, **options).hidden_states
    return [hidden_states[index] for index in indices]
