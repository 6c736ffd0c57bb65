"""Load a VLM from a checkpoint directory: ours, one in `llava-hf` layout, or one of the original TinyLLaVA Factory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, LlavaConfig

from tinyllava.checkpoint import legacy, legacy_hf, legacy_peft, legacy_weights
from tinyllava.checkpoint.adapter import ADAPTER, PEFT_PREFIX, check_base, has_adapter, map_adapter_names
from tinyllava.checkpoint.layout import get_published_name
from tinyllava.checkpoint.weight_files import find_base_files, list_misfits
from tinyllava.config import NATIVE_TEMPLATE
from tinyllava.console import silence_transformers
from tinyllava.data.template import Template
from tinyllava.errors import UserError
from tinyllava.files import FAULTS, check_model_files, read_json, shorten_error
from tinyllava.model.build import check_feature_layers
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.image_processor import load_trusted_class
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.parts import check_unquantised
from tinyllava.model.processor import build_processor
from tinyllava.model.quantise import is_quantised, quantise_llm
from tinyllava.model.vlm import VLM
from tinyllava.record import INDEX, read_record


def load(
    directory: Path, dtype: torch.dtype | str = "auto", attn_implementation: str | None = None, **missing: Any
) -> VLM:
    """Load the VLM of a checkpoint directory, with its adapter, on the CPU and in eval mode.

    It reads what `save` wrote, checkpoints in `llava-hf` layout, adapters of PEFT whose base can be found, and those of
    the original TinyLLaVA Factory. missing: values that the checkpoint does not contain: `template` for llava-hf's, and
    the keywords of `legacy.read_legacy` for the original's; or `load_in_4bit=True` or `load_in_8bit=True`, which
    quantise the LLM. Raises UserError when files or weights are missing or damaged.
    """
    directory = Path(directory)
    how = {"dtype": dtype} | ({"attn_implementation": attn_implementation} if attn_implementation else {})
    quantisation = legacy_hf.read_quantisation(missing)
    legacy_hf.check_keywords(missing)
    check_model_files(directory)
    if legacy.is_legacy(directory):
        original = legacy.read_legacy(directory, **missing)
        vlm = legacy.complete_vlm(original, _load_model(directory, original.config, how, original.state))
    elif legacy_peft.stands_alone(directory):
        base = legacy_peft.find_base(directory)
        vlm = load(base, dtype, attn_implementation, **missing)
        legacy_peft.add_adapter(vlm.model, directory, base)
        _drop_copies(vlm.model)
    else:
        vlm = _load_vlm(directory, how, missing)
    if quantisation:
        quantise_llm(vlm.model, quantisation)
    return vlm


def _load_vlm(directory: Path, how: dict[str, Any], missing: dict[str, Any]) -> VLM:
    """Load an ordinary checkpoint. how: keywords of `from_pretrained`. missing: as for `load`."""
    record = read_record(directory) or {}
    template_name = None if record else missing.pop("template", None)
    if missing:
        raise UserError(
            f"{directory} carries its own {', '.join(missing)}. Only checkpoints of the original need these."
        )

    config = _read_config(directory)
    plain_processor = legacy_hf.read_processor(directory)
    if config.model_type == "llava":
        config = legacy_hf.complete_config(config, plain_processor.image_processor, record)
    check_feature_layers(config)
    legacy_hf.check_image_token(directory, config, plain_processor)
    legacy_peft.check_adapter(directory)
    if (directory / ADAPTER).is_file():
        check_base(directory, find_base_files(directory))
    state = None if record else legacy_weights.read_pickled(directory)
    model = _load_model(directory, config, how, state)
    _drop_copies(model)

    tokenizer = plain_processor.tokenizer
    chat_template = plain_processor.chat_template or tokenizer.chat_template  # transformers 4 wrote it to either
    template = Template.load(template_name) if template_name else _read_template(record)
    if template_name:
        chat_template = template.get_chat_template(tokenizer)
    images, tokens = plain_processor.image_processor, config.image_seq_length
    return VLM(model.eval(), build_processor(config, images, tokenizer, chat_template, tokens), template, record)


def _drop_copies(model: TinyLlavaForConditionalGeneration) -> None:
    """Replace the wrapper in which peft keeps two connectors, the base's and the adapter's, by the adapter's."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save["default"])


def _read_config(directory: Path) -> LlavaConfig:
    """The config in `directory`: plain Llava's or ours. Raises UserError for anything else."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)  # None asks on the terminal
    except (*FAULTS, StrictDataclassError) as error:
        reason = shorten_error(error)
        raise UserError(
            f"cannot read {directory}: {reason}. If the part is yours, import the module that registers it first."
        ) from None
    if config.model_type not in {"llava", TinyLlavaConfig.model_type}:
        raise UserError(
            f"{directory} holds a {config.model_type} model, expected a llava one. An LLM or a vision tower is a part:"
            " name it in a recipe."
        )
    for part in (config, config.text_config, config.vision_config):  # AWQ tools write it for the LLM alone
        check_unquantised(directory, getattr(part, "quantization_config", None))
    if getattr(config, "image_processor", None):
        load_trusted_class(config.image_processor)
    return config


def _load_model(
    directory: Path, config: TinyLlavaConfig, how: dict[str, Any], state: dict[str, Tensor] | None
) -> TinyLlavaForConditionalGeneration:
    """The model with the weights in `directory` or in `state`. Raises UserError unless they fit exactly."""
    with silence_transformers():
        model, info = TinyLlavaForConditionalGeneration.from_pretrained(
            directory if state is None else None,
            config=config,
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one message with missing and unexpected weights
            **how,
        )
    unexpected = info["unexpected_keys"]
    # These belong to an adapter's connector, or are the identity layers that plain llava has for `linear`.
    if state is None:
        unexpected = {name for name in unexpected if "multi_modal_projector.linear_" not in name}
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    wrong = {"missing": info["missing_keys"], "unexpected": unexpected, "of another shape": mismatched}
    wrong = {kind: [get_published_name(model, name) for name in names] for kind, names in wrong.items()}
    if listed := list_misfits(wrong, 5):
        remedy = "Copy it again." if state is None else "Copy it again, or give the configs that it does not contain."
        raise UserError(f"{directory} does not fit its own config: weights {listed}. {remedy}")
    return model


def restore(model: TinyLlavaForConditionalGeneration, directory: Path) -> None:
    """Read the weights of a checkpoint, with its adapter, back into the model that it was saved from, to resume a run.

    Raises UserError when a weight is missing.
    """
    read_record(directory)
    index = read_json(directory / INDEX)["weight_map"]
    stored: dict[str, Tensor] = {}
    for file in sorted({*index.values(), *([ADAPTER] if has_adapter(model) else [])}):
        stored |= load_file(directory / file)
    parameters = dict(model.named_parameters())
    adapter = map_adapter_names(model, parameters) if has_adapter(model) else {}
    keys = {name: PEFT_PREFIX + key for key, name in adapter.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            key = keys.get(name) or get_published_name(model, name)
            if key not in stored:
                raise UserError(
                    f"{key} is missing in {directory}: it is a checkpoint of another model or tuning."
                    " Choose another --output."
                )
            if isinstance(parameter, DTensor):  # FSDP2: each rank copies its own shard
                mesh, placements = parameter.device_mesh, parameter.placements
                parameter.copy_(distribute_tensor(stored[key], mesh, placements, src_data_rank=None))
            elif not is_quantised(parameter):  # these are frozen, and already quantised from the same weights
                parameter.copy_(stored[key])


def _read_template(record: Mapping[str, Any]) -> Template:
    stored = record.get("template")
    if stored is None:
        return legacy_hf.ServedTemplate(NATIVE_TEMPLATE, None)
    if stored["compat"]:
        return Template.load(stored["name"], compat=True)
    return Template(stored["name"], stored["source"])  # its text is stored: the user's own file may no longer exist
