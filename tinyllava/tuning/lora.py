"""`lora`: low-rank adapters on the part's linear layers (arXiv 2106.09685), through peft.

tune: {llm: {lora: {r: 128, alpha: 256}, lr: 2.0e-4}}
"""

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from tinyllava.errors import UserError
from tinyllava.tuning import Part, Selection, linear_layers

ATTENTION = r"(^|\.)(q|k|v|o|out|qkv|query|key|value|dense)(_proj)?$"


@dataclass(config=ConfigDict(extra="forbid"))
class Tuning:
    """Adapters of rank `r`, scaled by alpha / r, on `targets`: all-linear, attention, or a regular expression on layer
    names.
    """

    r: int = Field(default=64, gt=0)
    alpha: int = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str = "all-linear"

    def select(self, part: Part) -> Selection:
        """The linear layers that get an adapter. Raises UserError when `targets` match none."""
        pattern = {"all-linear": None, "attention": ATTENTION}.get(self.targets, self.targets)
        targets = [name for name in linear_layers(part.module, pattern) if part.used(name)]
        if not targets:
            some = ", ".join(linear_layers(part.module)[:4]) or "no linear layers"
            raise UserError(
                f"LoRA targets '{self.targets}' match nothing in the {part.name.replace('_', ' ')} ({some}, ...)."
                " Use all-linear, attention, or a regular expression on such names."
            )
        return Selection(lora_targets=targets, lora={"r": self.r, "alpha": self.alpha, "dropout": self.dropout})
