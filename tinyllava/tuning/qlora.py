"""`qlora`: train LoRA adapters on a part whose linear layers are stored in 4 bits (arXiv 2305.14314).

    tune: {llm: {qlora: {r: 64, alpha: 16}, lr: 2.0e-4}}

Requires peft and bitsandbytes. The layers are stored as 4-bit NormalFloat with double quantisation, during training
only. A checkpoint holds the unquantised base weights and the adapter, so it loads, merges and resumes without
bitsandbytes. Layers compute in the stage's dtype (bf16 with `trainer: {bf16: true}`), else in the dtype of their input.
"""

from dataclasses import replace

from tinyllava.errors import UserError
from tinyllava.tuning import Selection, TunablePart, declare_options, find_linear_layers, lora

NF4 = {"quant_type": "nf4", "compress_statistics": True}  # compress_statistics: the scales are quantised as well


@declare_options
class Tuning(lora.Tuning):
    """LoRA on quantised layers: those of the repeated blocks, or all layers of a part without blocks."""

    def select(self, part: TunablePart) -> Selection:
        """Select LoRA's targets and the layers to quantise. Raises UserError for `new_tokens`."""
        if self.new_tokens:
            raise UserError(
                "qlora cannot train new_tokens: the base weights must not change. Use lora with new_tokens."
            )
        # Every name starts with "": without blocks, all layers are taken.
        blocks = tuple(f"{block}." for block in part.blocks) or ""
        layers = [name for name in find_linear_layers(part.module) if part.is_used(name) and name.startswith(blocks)]
        return replace(super().select(part), quantised=layers, quantisation=NF4)
