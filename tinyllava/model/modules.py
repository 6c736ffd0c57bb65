"""The parts of a model by the names of their parameters, their repeated layers, and whether weights are sharded."""

from itertools import zip_longest

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tinyllava.config import PARTS
from tinyllava.vision_towers import CompositeTower

MODULES = {  # the name of each part in the model
    "vision_tower": "model.vision_tower",
    "connector": "model.multi_modal_projector",
    "llm": "model.language_model",
}


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


def find_part(name: str) -> str:
    """The part that a parameter of the whole model belongs to. The output head belongs to the LLM."""
    return next((part for part, module in MODULES.items() if name.startswith(module + ".")), "llm")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter: `lora_A`, `lora_B`, DoRA's `lora_magnitude_vector`."""
    return ".lora_" in name


def find_untrained_parts(model: nn.Module) -> list[str]:
    """The parts whose base weights are not trained: frozen ones, and those under an adapter."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [part for part in PARTS if part not in {find_part(name) for name in trained if not is_adapter(name)}]
