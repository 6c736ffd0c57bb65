"""The weights of the original's checkpoints: its files, its names, its adapters; and what they are called today."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinyllava.errors import UserError

PARTS = {"language_model": "language_model.", "vision_tower": "vision_tower._vision_tower.", "connector": "connector."}
TOWER, CONNECTOR, HEAD = PARTS["vision_tower"], "connector._connector.", "language_model.lm_head.weight"
BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # older transformers saved them; they hold nothing learned


def read_state(directory: Path) -> dict[str, Tensor]:
    """All weights under the names of the full layout (TinyLLaVABench's: its own), an adapter merged.

    Raises UserError for files that are not whole, and for weights without their scales.
    """
    if (directory / "language_model").is_dir():
        state = {}
        for part, prefix in PARTS.items():
            stored = read_tensors(directory / part, "pytorch_model", "model")
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
    return merge_adapter(state, directory) if (directory / "adapter_config.json").is_file() else state


def merge_adapter(state: Mapping[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """W + (alpha / r) B A in fp32. (The original's loader cast W to fp16 first.)"""
    settings = read_json(directory / "adapter_config.json")
    odd = [name for name in ("use_dora", "fan_in_fan_out", "alpha_pattern", "modules_to_save") if settings.get(name)]
    if odd:
        raise UserError(
            f"{directory}: its adapter uses {', '.join(odd)}, which the original never wrote. Merge it first."
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
        raise UserError(f"{directory}: {some(unused)} of its adapter fit nothing in its base. Copy it again.")
    return merged


def published(state: Mapping[str, Tensor], llm: PreTrainedModel, connector: type[nn.Module]) -> dict[str, Tensor]:
    """The weights under the names that checkpoints have today. A name it does not know stays, to be refused as one.

    llm: one of this kind, with or without weights. connector: the class, which knows its original's names.
    """
    renames = {
        f"language_model.{llm.base_model_prefix}.": "language_model.model.",
        f"{TOWER}clip.vision_model.": "vision_tower.first.",
        f"{TOWER}dinov2.": "vision_tower.second.",
        TOWER: "vision_tower.",
    }
    made = {}
    for name, tensor in state.items():
        old = next((prefix for prefix in renames if name.startswith(prefix)), None)
        if not name.startswith(CONNECTOR):
            made[renames[old] + name.removeprefix(old) if old else name] = tensor
    own = {name.removeprefix(CONNECTOR): tensor for name, tensor in state.items() if name.startswith(CONNECTOR)}
    try:
        own = getattr(connector, "from_original", dict)(own)
    except (KeyError, ValueError, IndexError):
        raise UserError(
            f"the connector's weights are not those of a {connector.__module__.rsplit('.', 1)[-1]}: {some(own)}."
        ) from None
    made |= {f"multi_modal_projector.{name}": tensor for name, tensor in own.items()}
    head = made.pop(HEAD, None)
    if head is not None:  # tied, the other is the same
        made.setdefault(embeddings_name(llm) if llm.config.tie_word_embeddings else HEAD, head)
    return made


def embeddings_name(llm: PreTrainedModel) -> str:
    """What a checkpoint of today calls the LLM's input embeddings."""
    modules = llm.base_model.named_modules()
    return (
        "language_model.model." + next(n for n, module in modules if module is llm.get_input_embeddings()) + ".weight"
    )


def add_rows(state: dict[str, Tensor], llm: PreTrainedModel, count: int) -> None:
    """Rows of zeros for <image>, in the embeddings and the head."""
    for name in (embeddings_name(llm), HEAD, HEAD.replace("weight", "bias")):
        if name in state:
            state[name] = torch.cat([state[name], state[name].new_zeros(count, *state[name].shape[1:])])


def resample(state: Mapping[str, Tensor], name: str, grid: int) -> dict[str, Tensor]:
    """DINOv2's position embeddings `name` for `grid` x `grid` patches, as transformers 4.40.1 interpolated them.

    It scaled by (grid + 0.1) / own, today's transformers gives the size: 0.8 apart in the features of the parity
    checkpoint. Done once, here, so that the tower's own size is the picture's.
    """
    if name not in state:
        return {}
    cls, patches = state[name][:, :1], state[name][:, 1:]  # [1, 1, D], [1, own^2, D]
    own = math.isqrt(patches.shape[1])
    if own == grid:
        return {}
    square = patches.float().unflatten(1, (own, own)).permute(0, 3, 1, 2)  # [1, D, own, own]
    scale = (grid + 0.1) / own
    square = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return {name: torch.cat([cls, square.permute(0, 2, 3, 1).flatten(1, 2).to(cls.dtype)], dim=1)}


def read_tensors(folder: Path, *stems: str) -> dict[str, Tensor]:
    """The tensors of `STEM.safetensors` or `STEM.bin`, whole or in shards. Raises UserError where something lacks."""
    for name in [f"{stem}.{kind}" for stem in stems for kind in ("safetensors", "bin")]:
        index = folder / f"{name}.index.json"
        if not index.is_file() and not (folder / name).is_file():
            continue
        shards = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [name]
        state: dict[str, Tensor] = {}
        for shard in shards:
            if not (folder / shard).is_file():
                raise UserError(f"{folder} is not whole: {shard} is missing. Copy it again.")
            state |= load_file(folder / shard) if shard.endswith(".safetensors") else _unpickled(folder / shard)
        return state
    looked = ", ".join(f"{stem}.safetensors, {stem}.bin" for stem in stems)
    raise UserError(f"{folder} holds no weights: looked for {looked}, whole or in shards. Copy it again.")


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"cannot read {path} as plain tensors: {str(error).splitlines()[0]}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file. Raises UserError when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}. Copy it again.") from None


def some(names: Iterable[str], most: int = 20) -> str:
    """The names in order, and how many more."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
