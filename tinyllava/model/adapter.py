"""Adapters: LoRA layers in peft's own files, beside the base weights they belong to, or folded into them."""

from collections.abc import Mapping
from pathlib import Path

from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyllava.errors import UserError
from tinyllava.model.layout import as_llava, why_not_plain
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

ADAPTER = "adapter_model.safetensors"


def has_adapter(model: TinyLlavaForConditionalGeneration) -> bool:
    """Whether LoRA layers are in the model."""
    return bool(getattr(model, "peft_config", None))


def write_adapter(model: TinyLlavaForConditionalGeneration, state: Mapping[str, Tensor], directory: Path) -> None:
    """The adapter in peft's files.

    It carries the connector too (`modules_to_save`), so that it is whole even without its directory.
    """
    config = model.peft_config["default"]
    only = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    lora = get_peft_model_state_dict(model, state_dict=only, save_embedding_layers=False)
    prefix = "model.multi_modal_projector."
    connector = {name: tensor for name, tensor in state.items() if name.startswith(prefix) and ".lora_" not in name}
    connector = {name.replace(".base_layer.", "."): tensor for name, tensor in connector.items()}
    if why_not_plain(model) is None:
        connector = as_llava(model, connector, prefix)
    carried = bool(connector) and not any(name.startswith(prefix) for name in lora)
    adapter = {**lora, **(connector if carried else {})}
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    save_file(tensors, directory / ADAPTER, metadata={"format": "pt"})
    config.base_model_name_or_path = "."  # the base lies beside it
    config.inference_mode, training = True, config.inference_mode
    config.modules_to_save = ["multi_modal_projector"] if carried else None
    config.save_pretrained(directory)
    config.inference_mode, config.modules_to_save = training, None


def merge(model: TinyLlavaForConditionalGeneration) -> TinyLlavaForConditionalGeneration:
    """Fold the adapter into the base weights, in place: W + (alpha / r) B A. Raises UserError when there is none."""
    if not has_adapter(model):
        raise UserError("there is no adapter to merge: the checkpoint is full already.")
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            replace_module(model, name, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    return model


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
