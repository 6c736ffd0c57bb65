"""The weight files of a checkpoint: safetensors of each part, and an index over them. What did not change is linked."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinyllava.errors import UserError
from tinyllava.model.layout import PREFIXES

INDEX = "model.safetensors.index.json"
FILES = {"vision_tower": "vision_tower", "connector": "connector", "llm": "language_model"}


def write_weights(
    published: Mapping[str, Tensor], directory: Path, reuse: Mapping[str, list[Path]]
) -> dict[str, list[Path]]:
    """safetensors files per part, and the index over them."""
    weight_map: dict[str, str] = {}
    files: dict[str, list[Path]] = {}
    total = 0
    for part, prefix in PREFIXES.items():
        sources = reuse.get(part, [])
        if sources and all(source.is_file() for source in sources):
            files[part] = [directory / source.name for source in sources]
            for source in sources:
                link(source, directory / source.name)
                names, size = stored_in(source)
                weight_map |= dict.fromkeys(names, source.name)
                total += size
            continue
        state = {name: tensor for name, tensor in published.items() if name.startswith(prefix)}
        if any(tensor.dtype == torch.uint8 for tensor in state.values()):
            gone = ", ".join(map(str, sources)) or "none"
            raise UserError(f"the {part} is quantised, and the files with its own weights are gone ({gone}).")
        total += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        pattern = FILES[part] + "{suffix}.safetensors"
        plan = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size="5GB")
        names = sorted(plan.filename_to_tensors) if state else []
        files[part] = [directory / name for name in names]
        for name in names:
            weight_map |= dict.fromkeys(plan.filename_to_tensors[name], name)
            tensors = {key: state[key].detach().cpu().contiguous() for key in plan.filename_to_tensors[name]}
            save_file(tensors, directory / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def stored_in(file: Path) -> tuple[list[str], int]:
    """The names of the weights in a safetensors file, and how many bytes they take."""
    with safe_open(file, framework="pt") as weights:
        names = list(weights.keys())
    with file.open("rb") as raw:  # eight bytes with the header's length, the header, the weights
        return names, file.stat().st_size - 8 - int.from_bytes(raw.read(8), "little")


def part_files(directory: Path) -> dict[str, list[Path]]:
    """The weight files of each part in a checkpoint that `save` wrote."""
    return {part: sorted(directory.glob(f"{stem}*.safetensors")) for part, stem in FILES.items()}


def base_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint without its adapter's: those of the index, else the one there is."""
    index = directory / INDEX
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else []
    return [directory / name for name in sorted(set(names)) or ["model.safetensors"]]


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        shutil.copy2(source, target)
