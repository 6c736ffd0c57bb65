"""Set the precision in which weights are stored and multiplied during a stage."""

import logging

import torch
from torch import nn
from transformers import TrainingArguments

from tinyllava.config import PARTS
from tinyllava.model.modules import find_part, is_adapter
from tinyllava.model.quantise import set_compute_dtype

logger = logging.getLogger("tinyllava")
HALF = (torch.float16, torch.bfloat16)


def set_precision(model: nn.Module, args: TrainingArguments, is_half_chosen: bool = False) -> None:
    """Store in fp32 what a tuned model trains (master weights), whatever the precision of the files it came from.

    bf16's 8 bits lose an update of 1e-5 of a weight, and fp16's gradients underflow. is_half_chosen: the recipe names a
    half precision as `model.dtype`, so without mixed precision all weights stay in it. DeepSpeed keeps its own copy in
    fp32. Autocast has no effect on quantised layers, so their dtype is set.
    """
    is_mixed = args.bf16 or args.fp16
    if is_mixed:
        set_compute_dtype(model, torch.bfloat16 if args.bf16 else torch.float16)
    if args.deepspeed:
        return
    if is_half_chosen and not is_mixed:
        logger.warning("`model.dtype` keeps trained weights in half precision: small updates are lost")
        return
    weights = dict(model.named_parameters())
    trained = {part: [] for part in PARTS}  # for each trained weight, whether it belongs to an adapter
    for name in (name for name, weight in weights.items() if weight.requires_grad):
        trained[find_part(name)].append(is_adapter(name))
    first = min(PARTS.index(part) for part in PARTS if trained[part])  # gradients flow back to this part
    for name, weight in weights.items():
        part = find_part(name)
        # Without autocast, the weights of a part multiply in one precision; adapters convert their inputs themselves.
        is_beside_trained = not is_mixed and not all(trained[part])
        is_in_gradient = not is_mixed and weight.dtype == torch.float16 and PARTS.index(part) >= first
        # The CPU's norms take bf16 with weights in bf16 or fp32, not in fp16.
        is_foreign = args.bf16 and weight.dtype == torch.float16 and args.device.type == "cpu"
        if weight.dtype in HALF and (weight.requires_grad or is_beside_trained or is_in_gradient or is_foreign):
            if not weight.requires_grad:
                weight.stored_dtype = weight.dtype  # checkpoints hold frozen weights as they were
            weight.data = weight.data.float()
