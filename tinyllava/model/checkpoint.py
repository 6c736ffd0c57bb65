"""One directory is one checkpoint, in the layout the world reads.

    config.json  model.safetensors.index.json  vision_tower*.safetensors  connector.safetensors
    language_model*.safetensors tokenizer, processor, chat template  [adapter_config.json  adapter_model.safetensors]
    tinyllava.json

Weights carry the published `llava-hf` names. The config is plain `llava` wherever that is exact, so that transformers
and vLLM load the directory as it is; `why_not_plain` says when it is not. Every part has files of its own: what did
not change since the last save is a hard link. `tinyllava.json` is written last and lists every file with its size: a
directory that is not whole is refused.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlavaConfig, LlavaProcessor
from transformers.utils import logging as transformers_logging

from tinyllava.data.template import Template
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.model import legacy
from tinyllava.model.adapter import ADAPTER, has_adapter, replace_module, write_adapter
from tinyllava.model.layout import PREFIXES, plain_config, published_name, published_state, why_not_plain
from tinyllava.model.legacy_weights import some
from tinyllava.model.modeling import TinyLlavaConfig, TinyLlavaForConditionalGeneration
from tinyllava.model.processor import TinyLlavaProcessor, build_processor

RECORD = "tinyllava.json"
INDEX = "model.safetensors.index.json"
FORMAT = 1
FILES = {"vision_tower": "vision_tower", "connector": "connector", "llm": "language_model"}


# -- saving ------------------------------------------------------------------------------------------------------------


@contextmanager
def aside(directory: Path) -> Iterator[Path]:
    """Write into a directory beside `directory`, which appears only when all is written; what stood there before stays
    until then.
    """
    temporary = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if directory.exists():
            shutil.rmtree(directory)
        temporary.rename(directory)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        free = shutil.disk_usage(directory.parent).free // 2**20
        raise UserError(
            f"disk full while saving {directory} ({free} MiB free)."
            " Earlier checkpoints are untouched: free some space and start the same command again."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save(
    model: TinyLlavaForConditionalGeneration,
    processor: TinyLlavaProcessor,
    template: Template,
    directory: Path,
    run: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    reuse: Mapping[str, list[Path]] | None = None,
) -> dict[str, list[Path]]:
    """Write a whole checkpoint into `directory` and return the weight files of each part.

    `run` is what made it (recipe, stage, step, versions, data), kept in the record. `state_dict` replaces the model's
    own where a sharded trainer gathered it. `reuse` names files that hold exactly the weights of a part: they are
    linked, not written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor for name, tensor in (state_dict or model.state_dict()).items()}
    plain = why_not_plain(model) is None
    config = plain_config(model) if plain else model.config
    if not plain:
        config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    (processor.plain() if plain else processor).save_pretrained(directory)
    files = write_weights(published_state(model, state), directory, reuse or {})
    if has_adapter(model):
        write_adapter(model, state, directory)
    record = {
        "format": FORMAT,
        "plain": plain,
        "model": {name: getattr(model.config, name) for name in TinyLlavaConfig.own_fields()},
        "template": {"name": template.name, "compat": template.compat, "source": template.source},
        "run": dict(run or {}),
    }
    write_record(directory, record)
    return files


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """The last file of a checkpoint: what it is, and every file with its size."""
    sizes = {
        str(path.relative_to(directory)): path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()
    }
    sizes.pop(RECORD, None)
    (directory / RECORD).write_text(json.dumps({**record, "files": sizes}, indent=2) + "\n", encoding="utf-8")


def write_weights(
    published: Mapping[str, Tensor], directory: Path, reuse: Mapping[str, list[Path]]
) -> dict[str, list[Path]]:
    """safetensors files per part, and the index over them."""
    weight_map: dict[str, str] = {}
    files: dict[str, list[Path]] = {}
    total = 0
    for part, prefix in PREFIXES.items():
        state = {name: tensor for name, tensor in published.items() if name.startswith(prefix)}
        total += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        pattern = FILES[part] + "{suffix}.safetensors"
        plan = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size="5GB")
        names = sorted(plan.filename_to_tensors) if state else []
        files[part] = [directory / name for name in names]
        for name in names:
            weight_map |= dict.fromkeys(plan.filename_to_tensors[name], name)
        sources = {path.name: path for path in reuse.get(part, [])}
        if names and all(name in sources and sources[name].is_file() for name in names):
            for name in names:
                link(sources[name], directory / name)
            continue
        for name in names:
            tensors = {key: state[key].detach().cpu().contiguous() for key in plan.filename_to_tensors[name]}
            save_file(tensors, directory / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def part_files(directory: Path) -> dict[str, list[Path]]:
    """The weight files of each part in a checkpoint that `save` wrote."""
    return {part: sorted(directory.glob(f"{stem}*.safetensors")) for part, stem in FILES.items()}


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        shutil.copy2(source, target)


# -- loading -----------------------------------------------------------------------------------------------------------


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a checkpoint we wrote, None for anybody else's.

    Raises UserError when the directory is not whole.
    """
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{directory} is no checkpoint: it has no config.json. Give a directory made by `tinyllava train`."
        )
    if not (directory / RECORD).is_file():
        if (directory / INDEX).is_file() or (directory / "model.safetensors").is_file():
            return None
        raise UserError(f"{directory} is half written: it has a config.json but no weights. Use an earlier checkpoint.")
    record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    if record.get("format", 0) > FORMAT:
        raise UserError(
            f"{directory} was written by a newer version of tinyllava (format {record['format']}). Update tinyllava."
        )
    for name, size in record["files"].items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"{directory} is damaged: {name} {state}. Use an earlier checkpoint, or copy it again.")
    return record


def load(
    directory: Path, dtype: torch.dtype | str = "auto", attn_implementation: str | None = None, **lacking: Any
) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor, Template, dict[str, Any]]:
    """Model (adapter included, on the CPU, in eval mode), processor, template and record of a checkpoint directory.

    Reads what `save` wrote, checkpoints in `llava-hf` layout and, with what those are `lacking` (see `legacy.read`),
    the original TinyLLaVA Factory's. Raises UserError when files or weights are missing.
    """
    directory = Path(directory)
    if legacy.is_legacy(directory):
        return _load_legacy(directory, dtype, attn_implementation, lacking)
    if lacking:
        raise UserError(f"{directory} carries its own {', '.join(lacking)}: these are for checkpoints of the original.")
    record = read_record(directory) or {}
    config = AutoConfig.from_pretrained(directory)
    if config.model_type not in {"llava", TinyLlavaConfig.model_type}:
        raise UserError(f"{directory} holds a {config.model_type} model, not a llava one.")
    plain_processor = LlavaProcessor.from_pretrained(directory, backend="pil")
    if config.model_type == "llava":
        config = _from_plain(config, plain_processor, record)
    model = _load_model(directory, config, dtype, attn_implementation)
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # the connector inside an adapter: the same weights as in the base
            replace_module(model, name, module.modules_to_save["default"])
    processor = build_processor(
        config,
        plain_processor.image_processor,
        plain_processor.tokenizer,
        plain_processor.chat_template,
        config.image_seq_length,
    )
    return model.eval(), processor, _template_of(record), record


def _load_legacy(
    directory: Path, dtype: torch.dtype | str, attn_implementation: str | None, lacking: Mapping[str, Any]
) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor, Template, dict[str, Any]]:
    old = legacy.read(directory, **lacking)
    model = _load_model(directory, old.config, dtype, attn_implementation, old.state)
    model.generation_config = old.generation
    tokens = model.model.multi_modal_projector.num_tokens(old.config.num_patches)
    model.config.image_seq_length = tokens
    chat_template = old.template.chat_template(old.tokenizer)
    return (
        model.eval(),
        build_processor(model.config, old.images, old.tokenizer, chat_template, tokens),
        old.template,
        {},
    )


def _load_model(
    directory: Path,
    config: TinyLlavaConfig,
    dtype: torch.dtype | str,
    attn_implementation: str | None,
    state: dict[str, Tensor] | None = None,
) -> TinyLlavaForConditionalGeneration:
    """The model with the weights in `directory`, or those given. Raises UserError unless they are exactly its own."""
    kwargs = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with _quiet():
        model, info = TinyLlavaForConditionalGeneration.from_pretrained(
            directory if state is None else None,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with all else that is wrong
            **({} if state is None else {"state_dict": state}),
            **kwargs,
        )
    unexpected = info["unexpected_keys"]
    if state is None:  # the connector of an adapter, or the identities that a plain checkpoint has for a linear one
        unexpected = {name for name in unexpected if "multi_modal_projector.linear_" not in name}
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    wrong = {"missing": info["missing_keys"], "unexpected": unexpected, "of another shape": mismatched}
    if any(wrong.values()):
        listed = "; ".join(
            f"{len(names)} {kind} ({some(published_name(model, name) for name in names)})"
            for kind, names in wrong.items()
            if names
        )
        remedy = "Copy it again." if state is None else "Copy it again, or give the configs that it does not carry."
        raise UserError(f"{directory} does not fit its own config: weights {listed}. {remedy}")
    return model


def restore(model: TinyLlavaForConditionalGeneration, directory: Path) -> None:
    """Read the weights of a checkpoint of this very model back into it, adapter included (to resume a run).

    Raises UserError when the checkpoint lacks a weight.
    """
    read_record(directory)
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
    stored: dict[str, Tensor] = {}
    for file in sorted({*index.values(), *([ADAPTER] if has_adapter(model) else [])}):
        stored |= load_file(directory / file)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            lora = name.replace(".default.", ".")
            key = f"base_model.model.{lora}" if ".lora_" in name else published_name(model, name)
            if key not in stored:
                raise UserError(
                    f"{directory} lacks {key}: it is a checkpoint of another model or tuning. Use another --output."
                )
            parameter.copy_(stored[key])


def _from_plain(config: LlavaConfig, processor: LlavaProcessor, record: Mapping[str, Any]) -> TinyLlavaConfig:
    """Our config of a plain llava checkpoint: from its record, or for anybody else's from what Llava's config
    implies.
    """
    fields = config.to_dict()
    fields.pop("model_type", None)
    family = config.vision_config.model_type.removesuffix("_vision_model")
    prefix = Factory("vision_towers").get(family).prefix_tokens(config.vision_config)
    implied = {
        "connector": {"mlp": {"layers": 2, "act": config.projector_hidden_act}},
        "prefix_tokens": prefix,
        "drop_first_patch": prefix == 0,  # "default" drops one token whatever it is
        "image_size": processor.image_processor.crop_size["height"],
        "image_mean": list(processor.image_processor.image_mean),
        "image_std": list(processor.image_processor.image_std),
    }
    return TinyLlavaConfig(**{**fields, **implied, **record.get("model", {})})


def _template_of(record: Mapping[str, Any]) -> Template:
    stored = record.get("template")
    if stored is None:
        return Template.load("native")
    if stored["compat"]:
        return Template.load(stored["name"], compat=True)
    return Template(stored["name"], stored["source"])  # its text, not its name: a user's file may be gone by now


@contextmanager
def _quiet() -> Iterator[None]:
    """Our own message names what is missing; transformers' table of the same would come first."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
