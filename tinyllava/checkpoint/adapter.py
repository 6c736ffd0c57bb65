"""Adapters: write LoRA layers in peft's files beside their base weights, check them, and merge them.

The file of an adapter holds hashes of the base weights that it was trained on. Beside other weights, loading raises an
error.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from xxhash import xxh3_128

from tinyllava.checkpoint.layout import PREFIXES, explain_not_plain, to_llava_projector
from tinyllava.errors import UserError
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.modules import is_adapter

ADAPTER = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # starts every name in that file
CONNECTOR_PREFIX = "model.multi_modal_projector."
_hashes: dict[tuple, dict[str, bytes]] = {}  # of files by their inode, so that hard links are read once


def has_adapter(model: TinyLlavaForConditionalGeneration) -> bool:
    """Whether LoRA layers are in the model."""
    return bool(getattr(model, "peft_config", None))


def map_adapter_names(model: TinyLlavaForConditionalGeneration, names: Iterable[str]) -> dict[str, str]:
    """{name in peft's file: name in the model} of the adapter's parameters among `names`."""
    adapter = {name: name for name in names if is_adapter(name)}
    stored = get_peft_model_state_dict(model, state_dict=adapter, save_embedding_layers=False)
    # peft leaves out the `.weight` of DoRA's vectors and reads them with or without; transformers 5.23 only with it.
    return {f"{key}.weight" if key.endswith(".lora_magnitude_vector") else key: name for key, name in stored.items()}


def write_adapter(
    model: TinyLlavaForConditionalGeneration, state: Mapping[str, Tensor], directory: Path, base: list[Path]
) -> None:
    """Write the adapter in peft's files, with hashes of the base weights in the files `base`.

    The files also hold the connector (`modules_to_save`), so that peft alone can restore a trained connector.
    """
    config = model.peft_config["default"]
    lora = {stored: state[name] for stored, name in map_adapter_names(model, state).items()}
    connector = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if name.startswith(CONNECTOR_PREFIX) and not is_adapter(name)
    }
    if explain_not_plain(model) is None:
        connector = to_llava_projector(model, connector, CONNECTOR_PREFIX)
    # For peft, a module is either adapted or saved whole, so a connector with LoRA layers is not saved whole here.
    is_carried = bool(connector) and not any(name.startswith(CONNECTOR_PREFIX) for name in lora)
    adapter = {**lora, **connector} if is_carried else lora
    tensors = {f"{PEFT_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    base_hashes = hash_weights(base)
    if is_carried:
        base_hashes.pop("connector", None)
    save_file(tensors, directory / ADAPTER, metadata={"format": "pt", "base": json.dumps(base_hashes)})
    # For peft's AutoPeftModel, which requires that there is no `task_type`: peft has none for images and text.
    config.auto_mapping = {"base_model_class": "AutoModelForImageTextToText", "parent_library": "transformers"}
    # As in peft's own save: on disk the adapter is for inference, and the config in memory does not change.
    config.inference_mode, training = True, config.inference_mode
    config.modules_to_save = ["multi_modal_projector"] if is_carried else None
    config.save_pretrained(directory)
    config.inference_mode, config.modules_to_save = training, None


def check_base(directory: Path, base: list[Path]) -> None:
    """Raise UserError when the adapter in `directory` was trained on other weights than those in the files `base`.

    An adapter without hashes, such as one that peft wrote, is accepted.
    """
    with safe_open(directory / ADAPTER, framework="pt") as file:
        trained_on = json.loads((file.metadata() or {}).get("base", "{}"))
    present = hash_weights(base) if trained_on else {}
    if different := [part for part in trained_on if present.get(part) != trained_on[part]]:
        both = [[f"{part} {hashes.get(part, 'none')[:12]}" for part in different] for hashes in (trained_on, present)]
        expected, actual = map(", ".join, both)
        raise UserError(
            f"the adapter in {directory} belongs to another base: it was trained on {expected}, but the directory holds"
            f" {actual} (hashes of the weights). Put it next to the weights that it was saved with."
        )


def hash_weights(files: list[Path]) -> dict[str, str]:
    """A hash of each part's weights: names, shapes, dtypes and bytes. It does not depend on the split into `files`."""
    hashes = {name: digest for file in files for name, digest in _hash_tensors(file).items()}
    return {
        part: xxh3_128(b"".join(hashes[name] for name in sorted(hashes) if name.startswith(prefix))).hexdigest()
        for part, prefix in PREFIXES.items()
        if any(name.startswith(prefix) for name in hashes)
    }


def _hash_tensors(file: Path) -> dict[str, bytes]:
    """A hash of each tensor in a file, by name."""
    stat = file.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _hashes:
        hashes = {}
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (a file, not a mapping)
                tensor = weights.get_tensor(name)
                digest = xxh3_128(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
                hashes[name] = digest.digest()
        _hashes[key] = hashes
    return _hashes[key]


def merge_adapter(model: TinyLlavaForConditionalGeneration) -> TinyLlavaForConditionalGeneration:
    """Merge the adapter into the base weights, in place: W + (alpha / r) B A. Raises UserError when there is none."""
    if not has_adapter(model):
        raise UserError("there is no adapter to merge: the checkpoint already has full weights only.")
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    return model
