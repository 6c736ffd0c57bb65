"""Write and find the weight files of a checkpoint: safetensors files for each part, and an index over them.

A part that did not change is a hard link to the files of an earlier checkpoint.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from tinyllava import atomic
from tinyllava.checkpoint.layout import PREFIXES
from tinyllava.errors import UserError
from tinyllava.files import read_json
from tinyllava.record import INDEX, WEIGHT_FILES

SHARD_SIZE = "5GB"


def write_weights(
    published: Mapping[str, Tensor], directory: Path, reuse: Mapping[str, list[Path]]
) -> dict[str, list[Path]]:
    """Write safetensors files for each part, and the index. Returns the files of each part.

    published: weights under their names on disk. reuse: files that already hold the weights of a part; they are linked.
    """
    weight_map: dict[str, str] = {}
    files: dict[str, list[Path]] = {}
    total = 0
    for part, prefix in PREFIXES.items():
        sources = reuse.get(part, [])
        state = {name: tensor for name, tensor in published.items() if name.startswith(prefix)}
        if sources and all(source.is_file() for source in sources):
            for source in sources:
                atomic.link_file(source, directory / source.name)
            files[part] = [directory / name for name in sorted(source.name for source in sources)]
        # bitsandbytes packs 4-bit weights into uint8. No other weight has this dtype.
        elif any(tensor.dtype == torch.uint8 for tensor in state.values()):
            given = ", ".join(map(str, sources)) or "none given"
            raise UserError(f"the {part} is quantised, and the files of its unquantised weights are missing ({given}).")
        else:
            files[part] = _write_shards(state, WEIGHT_FILES[part], directory)
        for file in files[part]:
            names, size = read_weight_names(file)
            weight_map |= dict.fromkeys(names, file.name)
            total += size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _write_shards(state: Mapping[str, Tensor], stem: str, directory: Path) -> list[Path]:
    """Write the weights of one part. Returns its files."""
    if not state:  # a connector without weights
        return []
    pattern = stem + "{suffix}.safetensors"
    plan = split_torch_state_dict_into_shards(dict(state), filename_pattern=pattern, max_shard_size=SHARD_SIZE)
    for name in sorted(plan.filename_to_tensors):
        tensors = {key: state[key].detach().cpu().contiguous() for key in plan.filename_to_tensors[name]}
        save_file(tensors, directory / name, metadata={"format": "pt"})
    return [directory / name for name in sorted(plan.filename_to_tensors)]


def read_weight_names(file: Path) -> tuple[list[str], int]:
    """The names of the weights in a safetensors file, and their bytes."""
    with file.open("rb") as raw:  # eight bytes with the header's length, the header (JSON), the weights
        length = int.from_bytes(raw.read(8), "little")
        names = json.loads(raw.read(length)).keys() - {"__metadata__"}
    return sorted(names), file.stat().st_size - 8 - length


def find_base_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint, without the adapter's: those in its index, or else model.safetensors."""
    index = directory / INDEX
    names = read_json(index)["weight_map"].values() if index.is_file() else []
    return [directory / name for name in sorted(set(names)) or ["model.safetensors"]]


def list_names(names: Iterable[str], most: int = 20) -> str:
    """The first `most` names in sorted order, and the number of the others, as text."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def list_misfits(wrong: Mapping[str, Collection[str]], most: int) -> str:
    """Weights that do not fit a model, as text. wrong: {what is wrong: names}."""
    return "; ".join(f"{len(names)} {kind} ({list_names(names, most)})" for kind, names in wrong.items() if names)
