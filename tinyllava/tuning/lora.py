"""`lora`: train low-rank adapters on the part's linear layers (arXiv 2106.09685), with peft.

    tune: {llm: {lora: {r: 128, alpha: 256}, lr: 2.0e-4}}

`use_dora` (arXiv 2402.09353), `use_rslora` (arXiv 2312.03732) and `init_lora_weights` are peft's options. peft's
initialisations that change the base weights (pissa, olora, ...) are not supported: the base under an adapter never
changes. Your own tuning can set any field of peft's LoraConfig in `Selection.lora`.
"""

import re
from typing import Literal

from pydantic import Field

from tinyllava.errors import UserError
from tinyllava.tuning import Selection, TunablePart, declare_options, find_linear_layers

PROJECTIONS = r"(^|\.)(to_)?(q|k|v|o|kv|qkv|out|query|key|value)(_proj)?$"
ATTENTION = rf"{PROJECTIONS}|(attn|attention)\.(.*\.)?dense$"  # Phi's and DINOv2's output projections are `dense`


@declare_options
class Tuning:
    """Train adapters of rank `r`, scaled by alpha / r (rsLoRA: alpha / sqrt(r)).

    `targets` is all-linear, attention, or a regular expression on layer names. `new_tokens` also trains the rows of new
    tokens (see embeddings.py).
    """

    r: int = Field(default=64, gt=0)
    alpha: int = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str = "all-linear"
    new_tokens: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True

    def select(self, part: TunablePart) -> Selection:
        """Select the linear layers that get an adapter. Raises UserError if there are none, or no token is new."""
        pattern = {"all-linear": None, "attention": ATTENTION}.get(self.targets, self.targets)
        try:
            matching = find_linear_layers(part.module, pattern)
        except re.error as error:
            raise UserError(f"LoRA targets '{self.targets}' are not a regular expression: {error}.") from None
        targets = [name for name in matching if part.is_used(name)]
        if not targets:
            examples = ", ".join(find_linear_layers(part.module)[:4]) or "no linear layers"
            raise UserError(
                f"LoRA targets '{self.targets}' match nothing in the {part.title} ({examples}, ...)."
                " Use all-linear, attention, or a regular expression on such names."
            )
        same = {name: getattr(self, name) for name in ("r", "use_dora", "use_rslora", "init_lora_weights")}
        options = {**same, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        rows = part.require_new_rows() if self.new_tokens else {}
        return Selection(lora_targets=targets, lora=options, rows=rows)
