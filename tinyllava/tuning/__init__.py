"""How a part is trained, as data: one file a tuning, `class Tuning`, a pydantic dataclass of its options.

A tuning answers one question about one part (a vision tower, a connector or an LLM):

    select(part: Part) -> Selection      # which parameters train, which modules get LoRA, how the part is quantised

and imports nothing of ours but this contract. `train/tune.py` compiles the three answers into `requires_grad`, one
LoraConfig and the optimiser's parameter groups.
"""

import re
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Part:
    """A part as a tuning sees it: its module, and the layers that its output really depends on.

    `blocks` are the names of its repeated layers in order (`encoder.layers.0`, ...), found from the module structure.
    `parameters` are those that the loss can reach: a tower's layers above the feature layer are not among them.
    """

    name: str
    module: nn.Module
    blocks: list[str]
    parameters: list[str]

    def used(self, name: str) -> bool:
        """Whether the loss depends on the module `name` (dotted, relative to the part)."""
        return any(parameter.startswith(f"{name}.") for parameter in self.parameters)


@dataclass(frozen=True)
class Selection:
    """What to train of one part: names relative to the part."""

    parameters: list[str] = field(default_factory=list)
    lora_targets: list[str] = field(default_factory=list)
    lora: dict = field(default_factory=dict)  # r, alpha, dropout and further fields of peft's LoraConfig


def linear_layers(module: nn.Module, pattern: str | None = None) -> list[str]:
    """Names of all linear layers inside `module`, those matching the regular expression `pattern` if one is given."""
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    return [name for name in names if pattern is None or re.search(pattern, name)]
