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
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, LlavaConfig, LlavaProcessor

from tinyllava.data.template import ServedTemplate, Template
from tinyllava.errors import UserError
from tinyllava.factory import nearest
from tinyllava.model import legacy
from tinyllava.model.adapter import ADAPTER, PEFT, check_base, has_adapter, replace_module, stored_names, write_adapter
from tinyllava.model.build import tower_family
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.image_processor import trusted_class
from tinyllava.model.layout import plain_config, published_name, published_state, why_not_plain
from tinyllava.model.legacy_weights import some
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.parts import quiet
from tinyllava.model.processor import TinyLlavaProcessor, build_processor
from tinyllava.model.quantise import is_quantised
from tinyllava.model.weight_files import INDEX, base_files, write_weights

RECORD = "tinyllava.json"
FORMAT = 1


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
    linked, not written, and must be given for a part that is quantised.
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
        write_adapter(model, state, directory, base=[file for part in files.values() for file in part])
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

    Reads what `save` wrote, checkpoints in `llava-hf` layout and the original TinyLLaVA Factory's. `lacking` is what
    those do not carry: the template of the former, all of `legacy.read` for the latter. Raises UserError when files or
    weights are missing.
    """
    directory = Path(directory)
    if legacy.is_legacy(directory):
        return _load_legacy(directory, dtype, attn_implementation, lacking)
    record = read_record(directory) or {}
    another = None if record else lacking.pop("template", None)
    if lacking:
        raise UserError(f"{directory} carries its own {', '.join(lacking)}: these are for checkpoints of the original.")
    try:
        config = AutoConfig.from_pretrained(directory)
    except ValueError as error:  # which then lists all that transformers knows
        unknown = str(error).partition(". ")[0]
        raise UserError(
            f"cannot read {directory}: {unknown}. If the part is yours, import the module that registers it first."
        ) from None
    if config.model_type not in {"llava", TinyLlavaConfig.model_type}:
        raise UserError(f"{directory} holds a {config.model_type} model, not a llava one.")
    if getattr(config, "image_processor", None):
        trusted_class(config.image_processor)
    plain_processor = LlavaProcessor.from_pretrained(directory, backend="pil")
    if config.model_type == "llava":
        config = _from_plain(config, plain_processor, record)
    if (directory / ADAPTER).is_file():
        check_base(directory, base_files(directory))
    model = _load_model(directory, config, dtype, attn_implementation)
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # the connector inside an adapter: the same weights as in the base
            replace_module(model, name, module.modules_to_save["default"])
    template, tokenizer = Template.load(another) if another else _template_of(record), plain_processor.tokenizer
    processor = build_processor(
        config,
        plain_processor.image_processor,
        tokenizer,
        template.chat_template(tokenizer) if another else plain_processor.chat_template,
        config.image_seq_length,
    )
    return model.eval(), processor, template, record


def _load_legacy(
    directory: Path, dtype: torch.dtype | str, attn_implementation: str | None, lacking: Mapping[str, Any]
) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor, Template, dict[str, Any]]:
    for name in lacking:
        if name not in legacy.LACKING:
            raise UserError(f"no keyword '{name}'{nearest(name, legacy.LACKING)} Known: {', '.join(legacy.LACKING)}.")
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
    with quiet():
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
    parameters = dict(model.named_parameters())
    adapter = stored_names(model, parameters) if has_adapter(model) else {}
    keys = {name: PEFT + key for key, name in adapter.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            key = keys.get(name) or published_name(model, name)
            if key not in stored:
                raise UserError(
                    f"{directory} lacks {key}: it is a checkpoint of another model or tuning. Use another --output."
                )
            if isinstance(parameter, DTensor):  # FSDP2: each rank takes its share
                mesh, placements = parameter.device_mesh, parameter.placements
                parameter.copy_(distribute_tensor(stored[key], mesh, placements, src_data_rank=None))
            elif not is_quantised(parameter):  # which came from the weights that the checkpoint links
                parameter.copy_(stored[key])


def _from_plain(config: LlavaConfig, processor: LlavaProcessor, record: Mapping[str, Any]) -> TinyLlavaConfig:
    """Our config of a plain llava checkpoint: from its record, or for anybody else's from what Llava's config
    implies.
    """
    fields = config.to_dict()
    fields.pop("model_type", None)
    if "model" in record:
        return TinyLlavaConfig(**{**fields, **record["model"]})
    prefix = tower_family(config.vision_config).prefix_tokens(config.vision_config)
    implied = {
        "connector": {"mlp": {"layers": 2, "act": config.projector_hidden_act}},
        "prefix_tokens": prefix,
        "drop_first_patch": prefix == 0,  # "default" drops one token whatever it is
        "image_size": processor.image_processor.crop_size["height"],
        "image_mean": list(processor.image_processor.image_mean),
        "image_std": list(processor.image_processor.image_std),
    }
    return TinyLlavaConfig(**{**fields, **implied})


def _template_of(record: Mapping[str, Any]) -> Template:
    stored = record.get("template")
    if stored is None:
        return ServedTemplate("native", None)
    if stored["compat"]:
        return Template.load(stored["name"], compat=True)
    return Template(stored["name"], stored["source"])  # its text, not its name: a user's file may be gone by now
