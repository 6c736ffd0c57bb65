"""Tunings say how a part (a vision tower, a connector or an LLM) is trained. One file is one tuning.

Read full.py first, then lora.py.

A file defines one class, a pydantic dataclass of the tuning's options:

    class Tuning:
        def select(self, part: TunablePart) -> Selection: ...  # parameters to train, LoRA targets, layers to quantise

A tuning changes nothing by itself. `train/tune.py` compiles the selections of the three parts into `requires_grad`, one
LoraConfig and the optimiser's parameter groups. A tuning imports only this file and `errors` from the package.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import pydantic
from torch import nn

from tinyllava.errors import UserError

# A tuning's class becomes a dataclass of its options, which checks their types and refuses unknown ones.
declare_options = pydantic.dataclasses.dataclass(config=pydantic.ConfigDict(extra="forbid"))


@dataclass(frozen=True)
class TunablePart:
    """A part as a tuning sees it: its module, and the parameters that the loss depends on.

    `blocks` are the names of its repeated layers in order (`encoder.layers.0`, ...). `parameters` are the names of the
    parameters that the loss depends on. They do not include a tower's layers above the feature layer. `new_rows` are
    the rows of an LLM's embeddings for new tokens, such as `<image>`, that building the model added or filled.
    """

    name: str
    module: nn.Module
    blocks: list[str]
    parameters: list[str]
    new_rows: dict[str, list[int]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The part's name in messages: vision tower, connector, LLM."""
        return {"llm": "LLM"}.get(self.name, self.name.replace("_", " "))

    def is_used(self, name: str) -> bool:
        """Whether the loss depends on the module `name` (dotted, relative to the part)."""
        return any(parameter.startswith(f"{name}.") for parameter in self.parameters)

    def require_new_rows(self) -> dict[str, list[int]]:
        """Return `new_rows`. Raises UserError if there are none."""
        if not self.new_rows:
            raise UserError(
                f"the {self.title} has no new tokens, so there are no rows to train."
                " Use another tuning, or lora without new_tokens."
            )
        return self.new_rows


@dataclass(frozen=True)
class Selection:
    """What to train of one part, and how its weights are stored during training. Names are relative to the part."""

    parameters: list[str] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)  # parameters of which only these rows are trained
    lora_targets: list[str] = field(default_factory=list)
    lora: dict[str, Any] = field(default_factory=dict)  # fields of peft's LoraConfig
    quantised: list[str] = field(default_factory=list)  # linear layers to store in 4 bits
    quantisation: dict[str, Any] = field(default_factory=dict)  # options of bitsandbytes' Linear4bit


def find_linear_layers(module: nn.Module, pattern: str | None = None) -> list[str]:
    """Names of the linear layers inside `module`, optionally only those that match the regular expression `pattern`.

    The output projection of torch's MultiheadAttention is left out: its weight is read, but the layer is never called,
    so an adapter on it would have no effect.
    """
    names = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not isinstance(child, nn.modules.linear.NonDynamicallyQuantizableLinear)
    ]
    return [name for name in names if pattern is None or re.search(pattern, name)]
