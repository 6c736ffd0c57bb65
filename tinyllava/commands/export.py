"""`tinyllava export CHECKPOINT --to FORM --output DIR`: the same model in the form that somebody else reads.

merged   an ordinary checkpoint with the adapter folded into its weights
hf       merged if need be, with a model card: recipe, data and scores filled in; what `hf upload` takes
split    LLM, vision tower and connector apart: what llama.cpp's tools start from
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from tinyllava.commands.card import model_card, scores_of
from tinyllava.errors import UserError
from tinyllava.factory import nearest
from tinyllava.infer import find_checkpoint
from tinyllava.model import checkpoint
from tinyllava.model.adapter import has_adapter, merge
from tinyllava.model.parts import DTYPES
from tinyllava.model.split import write_split

FORMS = ("merged", "hf", "split")


def export(given: str, to: str, output: Path, name: str, dtype: str, lacking: Mapping[str, Any]) -> str | None:
    """Write the checkpoint that `given` means into `output`; returns why the result is not plain llava, None if it is.

    `name` is what the model card calls it, `dtype` what its weights are stored in. Raises UserError for an unknown form
    or dtype, an `output` that exists, or when there is nothing to merge.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'{nearest(dtype, list(DTYPES))} Known: {', '.join(DTYPES)}.")
    if to not in FORMS:
        raise UserError(f"unknown form '{to}'{nearest(to, list(FORMS))} Known: {', '.join(FORMS)}.")
    if output.exists():
        raise UserError(f"{output} exists already. Choose another --output, or remove it.")
    source = find_checkpoint(given)
    model, processor, template, record = checkpoint.load(source, DTYPES[dtype], **lacking)
    run = {**record.get("run", {}), "exported_from": source.name}
    if has_adapter(model) or to == "merged":
        model = merge(model)
    reason = checkpoint.why_not_plain(model)
    with checkpoint.aside(output) as directory:
        if to == "split":
            write_split(model, processor, directory)
        else:
            checkpoint.save(model, processor, template, directory, run)
        if to == "hf":
            card = model_card(model, template, run, scores_of(Path(given), source), name)
            card.save(directory / "README.md")
    return reason


def push(directory: Path, repository: str) -> str:
    """Upload a directory to the Hub as a model repository, made if it is not there; returns its address.

    Raises UserError without a token, without a Hub, or when the Hub refuses.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Export from TinyLLaVA Factory")
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, HFValidationError, HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{directory} is written, but was not uploaded to {repository}: {reason}"
            f"\nLog in with `hf auth login` if you have not, then: hf upload {repository} {directory}"
        ) from None
    return str(address)
