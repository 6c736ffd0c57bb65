"""Find the repeated layers of a part by name."""

from itertools import zip_longest

from torch import nn

from tinyllava.vision_towers import CompositeTower


def find_blocks(module: nn.Module) -> list[str]:
    """Names of the repeated layers of a tower or an LLM, in order: its longest list of modules of one class.

    The layers of a mixture alternate and are aligned at the end: its last four are the last two of each tower.
    """
    if isinstance(module, CompositeTower):
        towers = ([f"{name}.{block}" for block in find_blocks(tower)] for name, tower in module.members.items())
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
