"""Find the repeated layers of a part by name, and ask whether weights are sharded."""

from itertools import zip_longest

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tinyllava.vision_towers import CompositeTower


def find_blocks(module: nn.Module) -> list[str]:
    """Names of the repeated layers of a tower or an LLM, in order: its longest list of modules of one class.

    The layers of a mixture alternate and are aligned at the end: its last four are the last two of each tower.
    """
    if isinstance(module, CompositeTower):
        towers = ([f"{name}.{block}" for block in find_blocks(tower)] for name, tower in module.members.items())
        levels = zip_longest(*(reversed(blocks) for blocks in towers))
        return [block for level in levels for block in reversed(level) if block][::-1]
    lists = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    lists = [(name, layers) for name, layers in lists if len({type(layer) for layer in layers}) == 1]
    if not lists:
        return []
    name, blocks = max(lists, key=lambda item: len(item[1]))
    return [f"{name}.{index}" for index in range(len(blocks))]


def is_sharded(module: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP2 shards the weights. Every rank must then call the same modules in the same order."""
    if not dist.is_initialized():  # checked first, because generation asks at every token
        return False
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in module.parameters())
