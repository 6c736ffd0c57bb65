"""Load a vision tower, an LLM or a tokenizer: from a Hub id, a local directory, or a config with random weights."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from tinyllava.config import PART_TITLES, LLMSpec, ModelSpec, TokenizerSpec, VisionTowerSpec
from tinyllava.console import silence_transformers
from tinyllava.errors import UserError
from tinyllava.factory import Factory, suggest_nearest
from tinyllava.files import FAULTS, check_model_files, explain_hub_error, raise_value_errors, shorten_error
from tinyllava.find import is_hub_reachable, locate_part
from tinyllava.gguf_files import convert_gguf
from tinyllava.vision_towers import get_family_name, import_tower, join_tower_configs, split_tower_name

logger = logging.getLogger("tinyllava")
FAMILIES = {"llm": "llms", "vision_tower": "vision_towers"}
IMPORTS = {"llm": Factory("llms").import_file, "vision_tower": import_tower}
TITLES = {**PART_TITLES, "tokenizer": "tokenizer"}  # names in messages
PART_KEYS = {"tokenizer": "llm.tokenizer"}  # keys of a recipe's `model:` that differ from the part's name
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_part_config(part: str, spec: LLMSpec | VisionTowerSpec) -> PreTrainedConfig:
    """The transformers config of a part. A family of the user's own is registered under its model_type."""
    family = Factory(FAMILIES[part]).get(spec.family) if spec.family else None
    config = read_transformers_config(part, spec)
    if family is not None:
        name = config.model_type if part == "llm" else get_family_name(config.model_type)
        Factory(FAMILIES[part]).register(name, family)
    return config


def find_own_families(spec: ModelSpec, **configs: PreTrainedConfig) -> dict[str, str] | None:
    """The user's own families with classes that transformers does not have. A checkpoint must name them."""
    named = {part: getattr(spec, part).family for part in configs}
    foreign = [part for part, config in configs.items() if not type(config).__module__.startswith("transformers.")]
    return {FAMILIES[part]: named[part] for part in foreign if named[part]} or None


def read_transformers_config(part: str, spec: LLMSpec | VisionTowerSpec) -> PreTrainedConfig:
    """The config of a part. For a whole CLIP or SigLIP, it is the config of the vision model."""
    if spec.config is not None:
        return make_part_config(part, spec.config)
    if part == "llm":
        return read_named_config(part, spec.name)
    towers = [read_named_config(part, name) for name in split_tower_name(spec.name)]
    config = join_tower_configs(spec.name, [getattr(tower, "vision_config", tower) for tower in towers])
    return AutoConfig.for_model(**config) if isinstance(config, dict) else config


def read_named_config(part: str, name: str) -> PreTrainedConfig:
    """The transformers config of a Hub id, a directory or a GGUF file."""

    def read(name: str, **kwargs: Any) -> PreTrainedConfig:
        fields, _ = PreTrainedConfig.get_config_dict(name, **kwargs)
        check_unquantised(name, fields.get("quantization_config"))
        IMPORTS[part](fields.get("model_type"))  # before AutoConfig, which may know it only after this import
        return AutoConfig.from_pretrained(name, **kwargs)

    return load_named(part, name, read)


def check_unquantised(name: object, settings: dict[str, Any] | None) -> None:
    """Raise UserError for the `quantization_config` of stored weights: packed weights cannot be trained or merged."""
    if settings:
        method = dict(settings).get("quant_method")
        raise UserError(
            f"the weights in {name} are stored quantised ({method}). Give the ones that they were made from; qlora in a"
            " recipe, and load_in_4bit=True, quantise them."
        )


def load_part(
    part: str, spec: LLMSpec | VisionTowerSpec, config: PreTrainedConfig, auto: type, dtype: str, empty: bool
) -> PreTrainedModel:
    """Load a part: with the weights of a Hub id or directory, or with random ones."""
    attention = getattr(spec, "attn_implementation", None)  # only an LLM has it
    kwargs = {"attn_implementation": attention} if attention else {}

    def load(name: str, config: PreTrainedConfig) -> PreTrainedModel:
        options = {**kwargs, "config": config, "dtype": DTYPES[dtype], "output_loading_info": True}
        if part == "vision_tower":  # it can also be read from a Llava checkpoint
            options["key_mapping"] = {r"^vision_tower\.": ""}
        with silence_transformers():
            model, info = load_named(part, name, auto.from_pretrained, **options)
        # A path on this machine says nothing to others, and they should not see it.
        model.config.name_or_path = Path(name).name if os.path.exists(os.path.expanduser(name)) else name
        if missing := sorted(info["missing_keys"]):
            count, first = len(missing), ", ".join(missing[:3])
            logger.warning("%d weights are missing in %s and start random: %s ...", count, name, first)
        return model

    if empty or spec.config is not None:
        model = auto.from_config(config, **kwargs)
        initialize = getattr(Factory(FAMILIES[part]).get(spec.family), "initialize", None) if spec.family else None
        if initialize and not empty:
            initialize(model)
    elif part == "vision_tower" and len(split_tower_name(spec.name)) > 1:
        with torch.device("meta"):
            model = auto.from_config(config, **kwargs)
        model.load_members(split_tower_name(spec.name), load)
    else:
        model = load(spec.name, config)
    model.config.architectures = [type(model).__name__]
    return model


def load_tokenizer(spec: LLMSpec) -> PreTrainedTokenizerFast:
    """The LLM's tokenizer, or the one that the recipe names. Raises UserError if the recipe has to train it first."""
    if isinstance(spec.tokenizer, TokenizerSpec):
        raise UserError("this LLM has no tokenizer yet. Train one first: build(spec, tokenizer=train_tokenizer(...)).")
    tokenizer = load_named("tokenizer", spec.tokenizer or spec.name, AutoTokenizer.from_pretrained)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def fit_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, stated: dict[str, Any]) -> None:
    """Set a config's vocabulary size and special ids to those of the tokenizer, unless the recipe states them."""
    special_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    fields = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in special_ids}}
    config.update({name: value for name, value in fields.items() if name not in stated})


def load_named(part: str, name: str, load: Callable, **kwargs: Any) -> Any:
    """Call `load(name)`. Raises UserError when there is neither such a directory nor such a model on the Hub."""
    name = locate_part(part, name)
    if name.endswith(".gguf"):
        name = str(convert_gguf(Path(os.path.expanduser(name))))
    local = os.path.isdir(name)
    if local:
        check_model_files(Path(name))
    try:
        offline = not local and not is_hub_reachable()
        with raise_value_errors():
            return load(name, local_files_only=offline, trust_remote_code=False, **kwargs)  # None asks on the terminal
    except FAULTS as error:
        reason = shorten_error(error) if local else explain_hub_error(error)
        if not local and not is_hub_reachable():
            reason = "no such directory, not in the Hub's cache, and the Hub cannot be reached"
        raise UserError(
            f"cannot load the {TITLES[part]} '{name}': {reason}."
            f" Give a local directory: model.{PART_KEYS.get(part, part)}=/path/to/{name.rstrip('/').rsplit('/', 1)[-1]}"
        ) from None


def make_part_config(part: str, fields: dict[str, Any]) -> PreTrainedConfig:
    """A transformers config from a recipe's mapping, of the class that `model_type` names."""
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise UserError(
            f"model.{part}.config needs `model_type`, the transformers name of the architecture, like llama."
        )
    IMPORTS[part](model_type)
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise UserError(f"model.{part}.config: transformers does not know the model_type '{model_type}'.") from None
    if wrong := [name for name in fields if not hasattr(known, name)]:
        known_names = [name for name in known.to_dict() if not name.startswith("_")]
        raise UserError(
            f"model.{part}.config: {model_type} has no field {', '.join(wrong)}{suggest_nearest(wrong[0], known_names)}"
        )
    try:
        return AutoConfig.for_model(model_type, **fields)
    except StrictDataclassError as error:
        raise UserError(f"model.{part}.config: {str(error).splitlines()[-1].strip()}") from None
