"""`tinyllava export CHECKPOINT --to FORM --output DIR`: write the same model in a format that another tool reads.

merged   an ordinary checkpoint with the adapter merged into its weights
hf       the same with a model card (recipe, data, scores), for `hf upload`; an adapter is merged
adapter  the base and the LLM's adapter apart, as vLLM serves them with --enable-lora
split    LLM, vision tower and connector in directories of their own, for llama.cpp's tools
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from tinyllava import atomic, checkpoint
from tinyllava.checkpoint import legacy_hf
from tinyllava.checkpoint.adapter import has_adapter, merge_adapter
from tinyllava.checkpoint.saving import find_engines
from tinyllava.commands.card import find_scores, make_model_card
from tinyllava.commands.engines import show_engines
from tinyllava.commands.lora_module import make_serve_command, write_lora_module
from tinyllava.commands.split import write_split
from tinyllava.console import output
from tinyllava.errors import UserError
from tinyllava.factory import suggest_known
from tinyllava.infer import find_checkpoint
from tinyllava.model.parts import DTYPES
from tinyllava.model.vlm import VLM

FORMS = ("merged", "hf", "adapter", "split")


def export_and_show(
    path: str, to: str, output_dir: Path, push: str | None, dtype: str, lacking: Mapping[str, Any]
) -> None:
    """Export a checkpoint, upload it to the Hub repository `push` if there is one, and print what was written."""
    if push is not None:
        check_repository(push)
    vlm = export_checkpoint(path, to, output_dir, push or output_dir.name, dtype, lacking)
    if to == "split":
        for part in ("llm", "vision_tower", "connector"):
            output.print(f"{output_dir}/{part}", highlight=False, markup=False, soft_wrap=True)
    else:
        directory = output_dir / "base" if to == "adapter" else output_dir
        reason = checkpoint.explain_not_plain(vlm.model)
        kind = "plain llava" if reason is None else f"not plain llava: {reason}"
        output.print(f"{directory}: {kind}", highlight=False, markup=False, soft_wrap=True)
        show_engines(directory, output)
    if to == "adapter" and not find_engines(vlm.model)["vLLM"].startswith("no"):
        output.print(make_serve_command(output_dir), highlight=False, markup=False, soft_wrap=True)
    if push:
        output.print(f"uploaded to {push_to_hub(output_dir, push)}", highlight=False, markup=False, soft_wrap=True)


def export_checkpoint(path: str, to: str, output_dir: Path, name: str, dtype: str, lacking: Mapping[str, Any]) -> VLM:
    """Write a checkpoint in the form `to`, and return what was written. For `adapter`, this is the base.

    path: a checkpoint or a run. name: the model's name on its card. dtype: of the stored weights. lacking: keywords of
    `checkpoint.load`. Raises UserError for an unknown form or dtype, if `output_dir` exists, if there is no adapter
    to merge, and if vLLM cannot serve the adapter of `--to adapter`.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'{suggest_known(dtype, DTYPES)}")
    if to not in FORMS:
        raise UserError(f"unknown form '{to}'{suggest_known(to, FORMS)}")
    if output_dir.exists():
        raise UserError(f"{output_dir} exists already. Choose another --output, or delete it.")
    source = find_checkpoint(path)
    for key in legacy_hf.QUANTISATION:
        if key in lacking:
            raise UserError(f"{key}: quantised weights cannot be exported. Export without it, and quantise on loading.")
    vlm = checkpoint.load(source, DTYPES[dtype], **lacking)
    run = {**vlm.record.get("run", {}), "exported_from": source.name}
    if to != "adapter" and (has_adapter(vlm.model) or to == "merged"):
        merge_adapter(vlm.model)
    with atomic.write_directory(output_dir) as directory:
        if to == "split":
            write_split(vlm, directory)
        elif to == "adapter":
            write_lora_module(vlm, directory, output_dir, run)
        else:
            checkpoint.save(vlm, directory, run)
        if to == "hf":
            card = make_model_card(vlm, run, find_scores(Path(path), source), name)
            card.save(directory / "README.md")
    return vlm


def check_repository(name: str) -> None:
    """Raise UserError when no repository on the Hub can have this name: before the export, not after it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"--push {name!r} is not the name of a repository on the Hub, expected USER/NAME.") from None


def push_to_hub(directory: Path, repository: str) -> str:
    """Upload a directory to a model repository on the Hub and return its address. A new repository is created.

    Raises UserError without a token, if the Hub cannot be reached, and if it refuses the upload.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Export from TinyLLaVA Factory")
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, HFValidationError, HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{directory} is written, but not uploaded to {repository}: {reason}"
            f"\nLog in with `hf auth login`, then run: hf upload {repository} {shlex.quote(str(directory))}"
        ) from None
    return str(address)
