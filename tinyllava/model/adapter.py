"""Adapters: LoRA layers in peft's own files, beside the base weights they belong to, or folded into them.

The file of an adapter holds the fingerprints of the base weights that it was trained on: on others it is refused.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from xxhash import xxh3_128

from tinyllava.errors import UserError
from tinyllava.model.layout import PREFIXES, as_llava, why_not_plain
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

ADAPTER = "adapter_model.safetensors"
PEFT = "base_model.model."  # before every name in that file
_read: dict[tuple, dict[str, bytes]] = {}  # digests of files by their identity: hard links are read once


def has_adapter(model: TinyLlavaForConditionalGeneration) -> bool:
    """Whether LoRA layers are in the model."""
    return bool(getattr(model, "peft_config", None))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter: `lora_A`, `lora_B`, DoRA's `lora_magnitude_vector`."""
    return ".lora_" in name


def stored_names(model: TinyLlavaForConditionalGeneration, names: Iterable[str]) -> dict[str, str]:
    """What those of the parameters `names` that are the adapter's are called in its file: peft's name -> ours."""
    adapter = {name: name for name in names if is_adapter(name)}
    stored = get_peft_model_state_dict(model, state_dict=adapter, save_embedding_layers=False)
    # peft leaves the `.weight` of DoRA's vectors out and reads them with or without; transformers 5.23 only with it.
    return {key + ".weight" * key.endswith(".lora_magnitude_vector"): name for key, name in stored.items()}


def write_adapter(
    model: TinyLlavaForConditionalGeneration, state: Mapping[str, Tensor], directory: Path, base: list[Path]
) -> None:
    """The adapter in peft's files, with the fingerprints of the base weights in the files `base`.

    It carries the connector too (`modules_to_save`), so that it is whole even without its directory.
    """
    config = model.peft_config["default"]
    lora = {stored: state[name] for stored, name in stored_names(model, state).items()}
    prefix = "model.multi_modal_projector."
    connector = {name: tensor for name, tensor in state.items() if name.startswith(prefix) and not is_adapter(name)}
    connector = {name.replace(".base_layer.", "."): tensor for name, tensor in connector.items()}
    if why_not_plain(model) is None:
        connector = as_llava(model, connector, prefix)
    carried = bool(connector) and not any(name.startswith(prefix) for name in lora)
    adapter = {**lora, **(connector if carried else {})}
    tensors = {f"{PEFT}{name}": tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    trained_on = fingerprints(base)
    if carried:
        trained_on.pop("connector", None)
    save_file(tensors, directory / ADAPTER, metadata={"format": "pt", "base": json.dumps(trained_on)})
    config.base_model_name_or_path = "."  # the base lies beside it
    config.inference_mode, training = True, config.inference_mode
    config.modules_to_save = ["multi_modal_projector"] if carried else None
    config.save_pretrained(directory)
    config.inference_mode, config.modules_to_save = training, None


def check_base(directory: Path, base: list[Path]) -> None:
    """Raise UserError when the adapter in `directory` was trained on other weights than those in the files `base`.

    An adapter that says nothing of its base, such as one that peft wrote, passes.
    """
    with safe_open(directory / ADAPTER, framework="pt") as file:
        trained_on = json.loads((file.metadata() or {}).get("base", "{}"))
    found = fingerprints(base) if trained_on else {}
    other = [part for part in trained_on if found.get(part) != trained_on[part]]
    if other:
        wanted, here = (
            ", ".join(f"{part} {prints.get(part, 'none')[:12]}" for part in other) for prints in (trained_on, found)
        )
        raise UserError(
            f"the adapter in {directory} belongs to another base: it was trained on {wanted}, and here lies {here}"
            " (fingerprints of the weights). Put it beside the weights that it was saved with."
        )


def fingerprints(files: list[Path]) -> dict[str, str]:
    """A hash over names, shapes, dtypes and bytes of each part's weights, however they are spread over `files`."""
    digests = {name: digest for file in files for name, digest in _digests(file).items()}
    return {
        part: xxh3_128(b"".join(digests[name] for name in sorted(digests) if name.startswith(prefix))).hexdigest()
        for part, prefix in PREFIXES.items()
        if any(name.startswith(prefix) for name in digests)
    }


def _digests(file: Path) -> dict[str, bytes]:
    """A hash of each weight in a file."""
    stat = file.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _read:
        digests = {}
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (a file, not a mapping)
                tensor = weights.get_tensor(name)
                digest = xxh3_128(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
                digests[name] = digest.digest()
        _read[key] = digests
    return _read[key]


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
