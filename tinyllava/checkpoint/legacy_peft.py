"""Load an adapter that stands alone, as peft writes it: its base weights are in another directory or on the Hub.

    adapter_config.json  adapter_model.safetensors (or .bin)

`base_model_name_or_path` in its config names the base. `tinyllava train` writes adapters beside their base, so that
only adapters of `export --to adapter`, and of other programs such as TRL, look like this.
"""

import re
from pathlib import Path, PureWindowsPath

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
from peft import PeftConfig

from tinyllava.checkpoint.adapter import ADAPTER, check_base, has_adapter
from tinyllava.checkpoint.legacy_weights import read_tensors
from tinyllava.checkpoint.weight_files import find_base_files, list_misfits
from tinyllava.console import silence_transformers
from tinyllava.errors import UserError
from tinyllava.files import FAULTS, read_json, shorten_error
from tinyllava.find import is_hub_reachable
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.record import check_record, find_part_files
from tinyllava.runs import RECORD

SETTINGS = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
REMEDY = f"Write the right directory into base_model_name_or_path of its {SETTINGS}."


def stands_alone(directory: Path) -> bool:
    """Whether a directory holds an adapter, and no model."""
    is_model = (directory / "config.json").exists() or any(find_part_files(directory).values())
    return (directory / SETTINGS).is_file() and not is_model


def check_adapter(directory: Path) -> None:
    """Raise UserError when half of the adapter in a directory is missing, or it is not a LoRA."""
    weights = any((directory / name).exists() for name in WEIGHTS)
    if weights != (directory / SETTINGS).exists():
        missing = SETTINGS if weights else WEIGHTS[0]
        raise UserError(f"the adapter in {directory} is incomplete: {missing} is missing. Copy it again.")
    kind = read_json(directory / SETTINGS).get("peft_type") if weights else "LORA"
    if kind != "LORA":
        raise UserError(f"the adapter in {directory} is of peft_type {kind}, expected LORA. Merge it with peft first.")


def find_base(directory: Path) -> Path:
    """The directory of an adapter's base: a path, also relative to the adapter or above it, or a model on the Hub.

    When base and adapter were moved or copied together, the base is the folder of that name beside the adapter.
    Raises UserError, with the places searched, when there is none.
    """
    if (directory / RECORD).exists():  # `export --to adapter` wrote it
        check_record(directory)
    check_adapter(directory)
    settings = read_json(directory / SETTINGS)
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"the adapter in {directory} names no base. {REMEDY}")
    path = Path(name).expanduser()
    places = [path] if path.is_absolute() else [directory / path, directory.parent / path, path]
    places.append(directory.resolve().parent / PureWindowsPath(name).name)  # it takes both kinds of slashes
    for place in places:
        if (place / "config.json").is_file():
            return place
    looked = ", ".join(dict.fromkeys(str(place) for place in places))
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        try:
            offline, revision = not is_hub_reachable(), settings.get("revision")
            return Path(snapshot_download(name, revision=revision, local_files_only=offline))
        except (HTTPError, HFValidationError, LocalEntryNotFoundError):
            looked += f", the Hub's cache{' and the Hub' if is_hub_reachable() else ' (the Hub cannot be reached)'}"
    raise UserError(f"the base of the adapter in {directory} is missing: '{name}'. Looked in {looked}. {REMEDY}")


def add_adapter(model: TinyLlavaForConditionalGeneration, directory: Path, base: Path) -> None:
    """Put the adapter of a directory onto the model of its base. Raises UserError unless all of its weights fit."""
    if has_adapter(model):
        raise UserError(
            f"the base of the adapter in {directory} has an adapter of its own. Merge that first:"
            f" tinyllava export BASE --to merged. {REMEDY}"
        )
    if (directory / ADAPTER).is_file():
        check_base(directory, find_base_files(base))
    state = read_tensors(directory, "adapter_model")
    if any("lm_head.lora_" in name for name in state):
        raise UserError(f"the adapter in {directory} adapts the LLM's output head. Merge it with peft first.")
    # transformers reads the vectors of DoRA only under this name.
    state = {f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name: t for name, t in state.items()}
    try:
        config = PeftConfig.from_pretrained(directory)
        with silence_transformers():
            info = model.load_adapter(peft_config=config, adapter_state_dict=state, ignore_mismatched_sizes=True)
    except FAULTS as error:
        raise UserError(f"cannot read the adapter in {directory}: {shorten_error(error)}. {REMEDY}") from None
    mismatched = {name for name, *_ in info.mismatched_keys}
    wrong = {"missing": info.missing_keys, "unexpected": info.unexpected_keys, "of another shape": mismatched}
    if listed := list_misfits(wrong, 3):
        raise UserError(f"the adapter in {directory} does not fit its base: weights {listed}. {REMEDY}")
