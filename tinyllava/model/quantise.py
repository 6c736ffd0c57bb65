"""Store linear layers in 4 or 8 bits with bitsandbytes: to train adapters (QLoRA, arXiv 2305.14314), and to answer.

The packed weights are never saved: a checkpoint holds links to the files of the unquantised weights (train/start.py)
and the adapter.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from rich.progress import track
from torch import nn
from transformers import BitsAndBytesConfig

from tinyllava.console import messages
from tinyllava.errors import UserError
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

WEIGHTS_PER_SECOND = 30_000_000  # the speed of one CPU core: a progress bar is shown if it takes over two seconds


def quantise(model: TinyLlavaForConditionalGeneration, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the linear layers named in `layers` by bitsandbytes' Linear4bit, with its options, in place.

    With the option `threshold`, a layer becomes a Linear8bitLt. It runs on the accelerator if there is one. A model on
    the meta device keeps its shapes. Raises UserError when bitsandbytes is missing or does not support the device.
    """
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", 0)))
    bitsandbytes = _import_bitsandbytes(device)
    sizes = [model.get_submodule(name).weight.numel() for name in layers]
    hidden = model.device.type == "meta" or device.type != "cpu" or sum(sizes) < 2 * WEIGHTS_PER_SECOND
    for name in track(layers, "quantising", console=messages, transient=True, disable=hidden):
        layer, options = model.get_submodule(name), layers[name]
        shape, kwargs = (layer.in_features, layer.out_features), {"bias": False, "device": "meta"}
        if "threshold" in options:
            packed = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False, **kwargs, **options)
            packed.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False)
        else:
            packed = bitsandbytes.nn.Linear4bit(*shape, **kwargs, **options)
            packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, module=packed, **options)
        packed.bias = layer.bias
        # On CPUs with AVX512-BF16, a first forward in eval mode would repack the weights for inference. No gradient
        # flows through that layout: the first validation would end the training.
        packed.support_avx512bf16_for_cpu = False
        if layer.weight.device.type != "meta":
            packed = packed.to(device)
        model.set_submodule(name, packed.train(layer.training))
    model.is_loaded_in_4bit = True  # peft and `num_parameters` look at it


def quantise_llm(model: TinyLlavaForConditionalGeneration, config: BitsAndBytesConfig) -> None:
    """Quantise the linear layers of the LLM, to answer in less memory. Raises UserError as `quantise` does."""
    options: dict[str, Any] = {"threshold": config.llm_int8_threshold}
    if config.load_in_4bit:
        options = {"quant_type": config.bnb_4bit_quant_type, "compress_statistics": config.bnb_4bit_use_double_quant}
        options["quant_storage"] = config.bnb_4bit_quant_storage
    elif any("lora_magnitude_vector" in name for name, _ in model.named_parameters()):
        raise UserError("peft cannot use DoRA on layers of 8 bits. Use load_in_4bit=True, or merge the adapter first.")
    skipped = config.llm_int8_skip_modules or []
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and ".lora_" not in name]
    llm = [name for name in names if name.startswith("model.language_model.")]
    quantise(model, {name: options for name in llm if not any(skip in name for skip in skipped)})
    set_compute_dtype(model, config.bnb_4bit_compute_dtype or model.dtype)


def set_compute_dtype(model: TinyLlavaForConditionalGeneration, dtype: torch.dtype) -> None:
    """Let quantised layers multiply in `dtype`, for any input: autocast has no effect on them."""
    for module in model.modules():
        if getattr(module, "quant_state", None) is not None:
            module.compute_dtype, module.compute_type_is_set = dtype, True


def is_quantised(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds packed 4-bit numbers."""
    return getattr(parameter, "quant_state", None) is not None


def count_weights(parameter: nn.Parameter) -> int:
    """The number of weights in a parameter, packed or not."""
    return parameter.quant_state.shape.numel() if is_quantised(parameter) else parameter.numel()


def _import_bitsandbytes(device: torch.device) -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise UserError('4 and 8 bits require bitsandbytes: pip install "tinyllava-factory[qlora]"') from None
    if device.type not in bitsandbytes.supported_torch_devices:
        known = ", ".join(sorted(bitsandbytes.supported_torch_devices))
        raise UserError(
            f"bitsandbytes {bitsandbytes.__version__} cannot quantise on {device.type}. Supported: {known}."
        )
    return bitsandbytes
