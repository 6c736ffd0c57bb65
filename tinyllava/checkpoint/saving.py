"""Save a VLM: config, weights, adapter, tokenizer, processor, generation config, and the record that completes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyllava import atomic
from tinyllava.checkpoint.adapter import has_adapter, write_adapter
from tinyllava.checkpoint.layout import explain_not_plain, make_plain_config, to_published_state
from tinyllava.checkpoint.weight_files import write_weights
from tinyllava.engines import UNMERGED_CLASS, list_engines
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processor import clean_tokenizer
from tinyllava.model.vlm import VLM
from tinyllava.record import FORMAT, write_record


def save(
    vlm: VLM,
    directory: Path,
    run: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    reuse: Mapping[str, list[Path]] | None = None,
    name: Path | None = None,
) -> dict[str, list[Path]]:
    """Write a whole checkpoint into `directory` and return the weight files of each part.

    run: what made it (recipe, stage, step, versions, data), for the record. state_dict: the weights, if a trainer
    gathered them from shards; by default the model's. reuse: files that hold exactly the weights of a part. They are
    linked instead of written, and are required for a quantised part. name: the path that `directory` will be renamed
    to.
    """
    model, template = vlm.model, vlm.template
    directory.mkdir(parents=True, exist_ok=True)
    state = state_dict or model.state_dict()
    plain = explain_not_plain(model) is None
    config = make_plain_config(model) if plain else model.config
    if has_adapter(model) or not plain:
        config.architectures = [UNMERGED_CLASS if has_adapter(model) else type(model).__name__]
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    clean_tokenizer(vlm.tokenizer)
    (vlm.processor.to_plain() if plain else vlm.processor).save_pretrained(directory)
    files = write_weights(to_published_state(model, state), directory, reuse or {})
    if has_adapter(model):
        # The base weights are in the same directory. peft would look for a relative path where it runs.
        model.peft_config["default"].base_model_name_or_path = str((name or directory).resolve())
        write_adapter(model, state, directory, base=[file for part in files.values() for file in part])
    atomic.apply_umask(directory)
    record = {
        "format": FORMAT,
        "plain": plain,
        "engines": find_engines(model),
        "model": {name: getattr(model.config, name) for name in TinyLlavaConfig.list_own_fields()},
        "template": {"name": template.name, "compat": template.compat, "source": template.source},
        "run": dict(run or {}),
    }
    write_record(directory, record, [source for sources in (reuse or {}).values() for source in sources])
    return files


def find_engines(model: TinyLlavaForConditionalGeneration) -> dict[str, str]:
    """{engine: whether it can run the checkpoint of this model as it is, and why not} (see tinyllava/engines.py)."""
    projector = getattr(model.model.multi_modal_projector, "llava_projector", lambda: None)() or {}
    act, reason = projector.get("projector_hidden_act"), explain_not_plain(model)
    return list_engines(model.config, act, reason, has_adapter(model))
