"""Save a VLM: config, weights, adapter, tokenizer, processor, generation config, and the record that completes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyllava import atomic
from tinyllava.checkpoint.adapter import has_adapter, write_adapter
from tinyllava.checkpoint.layout import explain_not_plain, make_plain_config, to_published_state
from tinyllava.checkpoint.record import FORMAT, write_record
from tinyllava.checkpoint.weight_files import write_weights
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.processor import clean_tokenizer
from tinyllava.model.vlm import VLM


def save(
    vlm: VLM,
    directory: Path,
    run: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    reuse: Mapping[str, list[Path]] | None = None,
) -> dict[str, list[Path]]:
    """Write a whole checkpoint into `directory` and return the weight files of each part.

    run: what made it (recipe, stage, step, versions, data), for the record. state_dict: the weights, if a trainer
    gathered them from shards; by default the model's. reuse: files that hold exactly the weights of a part. They are
    linked instead of written, and are required for a quantised part.
    """
    model, template = vlm.model, vlm.template
    directory.mkdir(parents=True, exist_ok=True)
    state = state_dict or model.state_dict()
    plain = explain_not_plain(model) is None
    config = make_plain_config(model) if plain else model.config
    if not plain:
        config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    clean_tokenizer(vlm.tokenizer)
    (vlm.processor.to_plain() if plain else vlm.processor).save_pretrained(directory)
    files = write_weights(to_published_state(model, state), directory, reuse or {})
    if has_adapter(model):
        write_adapter(model, state, directory, base=[file for part in files.values() for file in part])
    atomic.apply_umask(directory)
    record = {
        "format": FORMAT,
        "plain": plain,
        "model": {name: getattr(model.config, name) for name in TinyLlavaConfig.list_own_fields()},
        "template": {"name": template.name, "compat": template.compat, "source": template.source},
        "run": dict(run or {}),
    }
    write_record(directory, record)
    return files
