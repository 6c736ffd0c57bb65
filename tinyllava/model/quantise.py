"""Linear layers held in 4 bits for the time of training (QLoRA, arXiv 2305.14314), by bitsandbytes.

Never saved: a checkpoint links the files that hold the weights as they were (stage.py), and the adapter lies beside.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from rich.progress import track
from torch import nn

from tinyllava.console import messages
from tinyllava.errors import UserError
from tinyllava.model.adapter import replace_module
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

A_SECOND = 30_000_000  # weights that one CPU core quantises in a second


def quantise(model: TinyLlavaForConditionalGeneration, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the linear layers named in `layers` by bitsandbytes' Linear4bit, with its options, in place.

    An accelerator, where there is one, quantises; a model on the meta device keeps its shapes. Raises UserError where
    bitsandbytes is absent or does not know the device.
    """
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", 0)))
    bitsandbytes = _library(device)
    sizes = [model.get_submodule(name).weight.numel() for name in layers]
    hidden = model.device.type == "meta" or device.type != "cpu" or sum(sizes) < 2 * A_SECOND
    for name in track(layers, "quantising", console=messages, transient=True, disable=hidden):
        layer, options = model.get_submodule(name), layers[name]
        packed = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, device="meta", **options)
        packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, module=packed, **options)
        packed.bias = layer.bias
        # On CPUs with AVX512-BF16 a first forward in eval mode would repack the weights for inference, in a layout
        # through which no gradient flows: a validation would end the training.
        packed.support_avx512bf16_for_cpu = False
        if layer.weight.device.type != "meta":
            packed = packed.to(device)
        replace_module(model, name, packed.train(layer.training))
    model.is_loaded_in_4bit = True  # what peft and `num_parameters` ask for


def compute_in(model: TinyLlavaForConditionalGeneration, dtype: torch.dtype) -> None:
    """Let quantised layers multiply in `dtype`, whatever comes in: autocast does not reach into them."""
    for module in model.modules():
        if getattr(module, "quant_state", None) is not None:
            module.compute_dtype, module.compute_type_is_set = dtype, True


def is_quantised(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds packed 4-bit numbers."""
    return getattr(parameter, "quant_state", None) is not None


def size(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for, packed or not."""
    return parameter.quant_state.shape.numel() if is_quantised(parameter) else parameter.numel()


def _library(device: torch.device) -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise UserError('qlora needs bitsandbytes: pip install "tinyllava-factory[qlora]"') from None
    if device.type not in bitsandbytes.supported_torch_devices:
        known = ", ".join(sorted(bitsandbytes.supported_torch_devices))
        raise UserError(
            f"bitsandbytes {bitsandbytes.__version__} cannot quantise on {device.type} (it can on {known})."
        )
    return bitsandbytes
