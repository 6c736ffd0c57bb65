"""`qlora`: LoRA on a part whose linear layers are held in 4 bits (arXiv 2305.14314), through peft and bitsandbytes.

tune: {llm: {qlora: {r: 64, alpha: 16}, lr: 2.0e-4}}

4-bit NormalFloat with double quantisation, for the time of training alone: a checkpoint holds the base weights as they
were and the adapter beside them, so it loads, merges and continues without bitsandbytes, in full precision. Layers
multiply in the stage's dtype (bf16 under `trainer: {bf16: true}`), else in that of what comes in.
"""

from dataclasses import replace

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from tinyllava.errors import UserError
from tinyllava.tuning import Part, Selection, linear_layers, lora

NF4 = {"quant_type": "nf4", "compress_statistics": True}  # compress_statistics: the scales are quantised once more


@dataclass(config=ConfigDict(extra="forbid"))
class Tuning(lora.Tuning):
    """LoRA, with its options, over quantised layers: those of the repeated blocks, or all of a part without blocks."""

    def select(self, part: Part) -> Selection:
        """LoRA's answer and the layers to quantise. Raises UserError for `new_tokens`: the base is not written anew."""
        if self.new_tokens:
            raise UserError("qlora cannot train new_tokens: the weights under it are never written. Use lora for both.")
        blocks = tuple(f"{block}." for block in part.blocks) or ""
        layers = [name for name in linear_layers(part.module) if part.used(name) and name.startswith(blocks)]
        return replace(super().select(part), quantised=layers, quantisation=NF4)
