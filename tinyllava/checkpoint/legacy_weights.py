"""Read the weights of the original's checkpoints, merge its adapters, and rename the weights to today's names."""

import math
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinyllava.checkpoint.weight_files import list_names
from tinyllava.errors import UserError
from tinyllava.files import FAULTS, check_model_files, read_json, shorten_error

# The prefix of the weights from each folder of a checkpoint in components.
FOLDERS = {
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector.",
}
TOWER, CONNECTOR, HEAD = FOLDERS["vision_tower"], "connector._connector.", "language_model.lm_head.weight"
BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # older transformers saved these constants


def read_state(directory: Path) -> dict[str, Tensor]:
    """All weights under the names of the full layout (TinyLLaVABench's keep theirs), with the adapter merged.

    Raises UserError for incomplete files, and for quantised weights without their scales.
    """
    if (directory / "language_model").is_dir():
        state = {}
        for folder, prefix in FOLDERS.items():
            stored = read_tensors(directory / folder, "pytorch_model", "model")
            state |= {prefix + name: tensor for name, tensor in stored.items()}
    else:
        state = read_tensors(directory, "model", "pytorch_model")
    state = {name.replace(".base_layer.", "."): t for name, t in state.items() if not name.endswith(BUFFERS)}
    codes = [name for name, tensor in state.items() if not tensor.is_floating_point()]
    if codes:
        raise UserError(
            f"{directory} holds {str(state[codes[0]].dtype).removeprefix('torch.')} codes without their scales"
            f" ({codes[0]}), as the original's QLoRA wrote: the weights cannot be recovered. Use another checkpoint."
        )
    return merge_original_adapter(state, directory) if (directory / "adapter_config.json").is_file() else state


def merge_original_adapter(state: Mapping[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """Merge the adapter: W + (alpha / r) B A in fp32. (The original's loader cast W to fp16 first.)"""
    settings = read_json(directory / "adapter_config.json")
    odd = [name for name in ("use_dora", "fan_in_fan_out", "alpha_pattern", "modules_to_save") if settings.get(name)]
    if odd:
        raise UserError(
            f"{directory}: its adapter uses {', '.join(odd)}, which the original never wrote. Merge it with peft first."
        )
    adapter = read_tensors(directory, "adapter_model")
    adapter = {name.removeprefix("base_model.model.").replace(".default.", "."): t for name, t in adapter.items()}
    merged, unused = dict(state), set(adapter)
    for name, down in adapter.items():
        target, up = name.removesuffix("lora_A.weight") + "weight", name.replace(".lora_A.", ".lora_B.")
        if name.endswith(".lora_A.weight") and target in state and up in adapter:
            scale = settings["lora_alpha"] / (math.sqrt(len(down)) if settings.get("use_rslora") else len(down))
            merged[target] = state[target].float() + scale * (adapter[up].float() @ down.float())
            unused -= {name, up}
        elif name in state and name.endswith(".bias"):  # lora_bias: all
            merged[name] = down
            unused.discard(name)
    if unused:
        raise UserError(f"{directory}: {list_names(unused)} of its adapter fit nothing in its base. Copy it again.")
    return merged


def rename_weights(state: Mapping[str, Tensor], llm: PreTrainedModel, connector: type[nn.Module]) -> dict[str, Tensor]:
    """The weights under the names that checkpoints have today. An unknown name is kept, and loading reports it.

    llm: a model of the same class, with or without weights. connector: the class, which knows the original's names.
    """
    renames = {
        f"language_model.{llm.base_model_prefix}.": "language_model.model.",
        f"{TOWER}clip.vision_model.": "vision_tower.first.",
        f"{TOWER}dinov2.": "vision_tower.second.",
        TOWER: "vision_tower.",
    }
    renamed = {}
    for name, tensor in state.items():
        old = next((prefix for prefix in renames if name.startswith(prefix)), None)
        if not name.startswith(CONNECTOR):
            renamed[renames[old] + name.removeprefix(old) if old else name] = tensor
    stored = {name.removeprefix(CONNECTOR): tensor for name, tensor in state.items() if name.startswith(CONNECTOR)}
    try:
        weights = getattr(connector, "from_original", dict)(stored)
    except (KeyError, ValueError, IndexError):
        raise UserError(
            f"the connector's weights are not those of a {connector.__module__.rsplit('.', 1)[-1]}:"
            f" {list_names(stored)}."
        ) from None
    renamed |= {f"multi_modal_projector.{name}": tensor for name, tensor in weights.items()}
    head = renamed.pop(HEAD, None)
    if head is not None:  # a tied head has the same weights as the embeddings
        renamed.setdefault(name_embeddings(llm) if llm.config.tie_word_embeddings else HEAD, head)
    return renamed


def name_embeddings(llm: PreTrainedModel) -> str:
    """The name that the LLM's input embeddings have in today's checkpoints."""
    modules = llm.base_model.named_modules()
    return (
        "language_model.model." + next(n for n, module in modules if module is llm.get_input_embeddings()) + ".weight"
    )


def add_image_rows(state: dict[str, Tensor], llm: PreTrainedModel, count: int) -> None:
    """Add rows of zeros for <image> to the embeddings and the head."""
    for name in (name_embeddings(llm), HEAD, HEAD.replace("weight", "bias")):
        if name in state:
            state[name] = torch.cat([state[name], state[name].new_zeros(count, *state[name].shape[1:])])


def resample_positions(state: Mapping[str, Tensor], name: str, grid: int) -> dict[str, Tensor]:
    """DINOv2's position embeddings `name` for `grid` x `grid` patches, as transformers 4.40.1 interpolated them.

    Version 4.40.1 scaled by (grid + 0.1) / side; today's transformers passes the size. The features of the parity
    checkpoint then differ by 0.8. Resampling once, here, makes the tower's size equal to the size of its images.
    """
    if name not in state:
        return {}
    cls, patches = state[name][:, :1], state[name][:, 1:]  # [1, 1, D], [1, side^2, D]
    side = math.isqrt(patches.shape[1])
    if side == grid:
        return {}
    square = patches.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, side, side]
    scale = (grid + 0.1) / side
    square = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return {name: torch.cat([cls, square.permute(0, 2, 3, 1).flatten(1, 2).to(cls.dtype)], dim=1)}


def read_pickled(directory: Path) -> dict[str, Tensor] | None:
    """The weights of a model that transformers wrote as `pytorch_model.bin`; None if it has safetensors."""
    if any(directory.glob("model.safetensors*")):
        return None
    state = read_tensors(directory, "pytorch_model")
    return {name: tensor for name, tensor in state.items() if not name.endswith(BUFFERS)}


def read_tensors(folder: Path, *stems: str) -> dict[str, Tensor]:
    """The tensors of `STEM.safetensors` or `STEM.bin`, whole or in shards. Raises UserError when a file is missing."""
    for name in [f"{stem}.{kind}" for stem in stems for kind in ("safetensors", "bin")]:
        index = folder / f"{name}.index.json"
        if not index.exists() and not (folder / name).exists():
            continue
        check_model_files(folder)
        shards = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else [name]
        state: dict[str, Tensor] = {}
        for shard in shards:
            state |= load_file(folder / shard) if shard.endswith(".safetensors") else _unpickle(folder / shard)
        return state
    looked = ", ".join(f"{stem}.safetensors, {stem}.bin" for stem in stems)
    raise UserError(f"{folder} holds no weights: looked for {looked}, whole or in shards. Copy it again.")


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle. Code in it never runs: `weights_only` refuses it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise UserError(
            f"cannot read {path} as plain tensors: it is damaged, or holds other objects, whose code could do anything."
            " Ask its author for safetensors."
        ) from None
    except (*FAULTS, EOFError) as error:
        raise UserError(f"cannot read {path} as plain tensors: {shorten_error(error)}. Copy it again.") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds other things than named tensors: it is not the weights of a model.")
    return content
