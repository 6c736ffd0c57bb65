"""How a part is trained, as data: one file a tuning, `class Tuning`, a pydantic dataclass of its options.

A tuning answers one question about one part (a vision tower, a connector or an LLM):

    select(part: Part) -> Selection      # which parameters train, which modules get LoRA, how the part is quantised

and imports nothing of ours but this contract. `train/tune.py` compiles the three answers into `requires_grad`, one
LoraConfig and the optimiser's parameter groups.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tinyllava.errors import UserError


@dataclass(frozen=True)
class Part:
    """A part as a tuning sees it: its module, and the layers that its output really depends on.

    `blocks` are the names of its repeated layers in order (`encoder.layers.0`, ...), found from the module structure.
    `parameters` are those that the loss can reach: a tower's layers above the feature layer are not among them.
    `new_rows` are the rows of an LLM's embeddings that tokens got when the model was built, `<image>` among them.
    """

    name: str
    module: nn.Module
    blocks: list[str]
    parameters: list[str]
    new_rows: dict[str, list[int]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What a message calls it."""
        return {"llm": "LLM"}.get(self.name, self.name.replace("_", " "))

    def used(self, name: str) -> bool:
        """Whether the loss depends on the module `name` (dotted, relative to the part)."""
        return any(parameter.startswith(f"{name}.") for parameter in self.parameters)

    def require_new_rows(self) -> dict[str, list[int]]:
        """`new_rows`. Raises UserError when there are none."""
        if not self.new_rows:
            raise UserError(
                f"the {self.title} got no new tokens when the model was built, so there are no rows to train."
            )
        return self.new_rows


@dataclass(frozen=True)
class Selection:
    """What to train of one part, and how it is held meanwhile: names relative to the part."""

    parameters: list[str] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)  # parameters of which these rows alone are trained
    lora_targets: list[str] = field(default_factory=list)
    lora: dict[str, Any] = field(default_factory=dict)  # fields of peft's LoraConfig
    quantised: list[str] = field(default_factory=list)  # linear layers held in 4 bits; nothing else of the part changes
    quantisation: dict[str, Any] = field(default_factory=dict)  # options of bitsandbytes' Linear4bit


def linear_layers(module: nn.Module, pattern: str | None = None) -> list[str]:
    """Names of all linear layers inside `module` that are called as layers, those matching the regular expression
    `pattern` if one is given.

    Torch's MultiheadAttention only reads the weight of its output projection: an adapter there would never run.
    """
    names = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not isinstance(child, nn.modules.linear.NonDynamicallyQuantizableLinear)
    ]
    return [name for name in names if pattern is None or re.search(pattern, name)]
