"""Set the precision in which weights are stored and multiplied during a stage."""

import torch
from torch import nn
from transformers import TrainingArguments

from tinyllava.model.quantise import set_compute_dtype


def set_precision(model: nn.Module, args: TrainingArguments) -> None:
    """Prepare a tuned model for mixed precision, if `args` have `bf16` or `fp16`.

    Trained weights are stored in fp32 (master weights), because bf16's 8 bits lose an update of 1e-5 of a weight.
    DeepSpeed keeps its own copy in fp32. Autocast has no effect on quantised layers, so their dtype is set.
    """
    if not (args.bf16 or args.fp16):
        return
    set_compute_dtype(model, torch.bfloat16 if args.bf16 else torch.float16)
    if args.deepspeed:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
