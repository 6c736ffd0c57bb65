"""Parts from where they are: a Hub id, a local directory, or a config with random weights; and their tokenizer."""

import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from tinyllava.config import LLMSpec, ModelSpec, TokenizerSpec, VisionTowerSpec
from tinyllava.data.sample import IMAGE_TOKEN, Sample
from tinyllava.data.template import Template
from tinyllava.errors import UserError
from tinyllava.factory import Factory, nearest
from tinyllava.model import gguf
from tinyllava.vision_towers import family_name

logger = logging.getLogger("tinyllava")
TOKENIZER_SAMPLES = 20_000  # enough for a small vocabulary, a few seconds to render
FAMILIES = {"llm": "llms", "vision_tower": "vision_towers"}
PART_NAMES = {"llm": "LLM", "vision_tower": "vision tower", "tokenizer": "tokenizer"}
PART_KEYS = {"tokenizer": "llm.tokenizer"}
PART_FOLDERS = {"tokenizer": "llm"}
# Parts and a finished model that come with the package (docs/nano.md): nano/vision_tower, nano/llm, nano/model.
NANO = "nano"
NANO_FOLDER = Path(__file__).parents[1] / NANO
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def part_config(part: str, spec: LLMSpec | VisionTowerSpec) -> PreTrainedConfig:
    """The transformers config of a part. A family of the user's own is known by its model_type from here on."""
    family = Factory(FAMILIES[part]).get(spec.family) if spec.family else None
    config = transformers_config(part, spec)
    if family is not None:
        Factory(FAMILIES[part]).register(config.model_type if part == "llm" else family_name(config), family)
    return config


def own_families(spec: ModelSpec, **configs: PreTrainedConfig) -> dict[str, str] | None:
    """The user's own families whose classes transformers lacks: what a checkpoint must name to be loaded."""
    named = {part: getattr(spec, part).family for part in configs}
    foreign = [part for part, config in configs.items() if not type(config).__module__.startswith("transformers.")]
    return {FAMILIES[part]: named[part] for part in foreign if named[part]} or None


def transformers_config(part: str, spec: LLMSpec | VisionTowerSpec) -> PreTrainedConfig:
    """What the config says: of a whole CLIP or SigLIP, its vision half."""
    if spec.config is not None:
        return config_of(part, spec.config)
    if part == "llm":
        return found(part, spec.name, AutoConfig.from_pretrained)
    towers = [found(part, name, AutoConfig.from_pretrained) for name in tower_names(spec.name)]
    towers = [getattr(tower, "vision_config", tower) for tower in towers]
    return towers[0] if len(towers) == 1 else AutoConfig.for_model("mof", first=towers[0], second=towers[1])


def tower_names(name: str) -> list[str]:
    """`mof:A+B` names two towers, anything else one. Raises UserError for a mixture of another number."""
    names = name.removeprefix("mof:").split("+") if name.startswith("mof:") else [name]
    if name.startswith("mof:") and (len(names) != 2 or not all(names)):
        raise UserError(f"vision tower '{name}': a mixture has two towers. Write mof:FIRST+SECOND.")
    return names


def load_part(
    part: str, spec: LLMSpec | VisionTowerSpec, config: PreTrainedConfig, auto: type, dtype: str, empty: bool
) -> PreTrainedModel:
    """The weights of a part: from a Hub id or directory, or random ones."""
    kwargs = (
        {} if getattr(spec, "attn_implementation", None) is None else {"attn_implementation": spec.attn_implementation}
    )

    def load(name: str, config: PreTrainedConfig) -> PreTrainedModel:
        own = {**kwargs, "config": config, "dtype": DTYPES[dtype], "output_loading_info": True}
        if part == "vision_tower":  # a Llava checkpoint, too, has one
            own["key_mapping"] = {r"^vision_tower\.": ""}
        with quiet():
            model, info = found(part, name, auto.from_pretrained, **own)
        model.config.name_or_path = name  # `nano`, and not where the package lies on this machine
        if absent := sorted(info["missing_keys"]):
            logger.warning("%s lacks %d weights, which start random: %s ...", name, len(absent), ", ".join(absent[:3]))
        return model

    if empty or spec.config is not None:
        model = auto.from_config(config, **kwargs)
        initialize = getattr(Factory(FAMILIES[part]).get(spec.family), "initialize", None) if spec.family else None
        if initialize and not empty:
            initialize(model)
    elif spec.name.startswith("mof:"):
        with torch.device("meta"):
            model = auto.from_config(config, **kwargs)
        first, second = tower_names(spec.name)
        model.first, model.second = load(first, config.first), load(second, config.second)
    else:
        model = load(spec.name, config)
    model.config.architectures = [type(model).__name__]
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Our own message names what is missing; transformers' table of that and of the unexpected would come first."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def load_tokenizer(
    spec: LLMSpec, template: Template, samples: Callable[[], Iterable[Sample]]
) -> PreTrainedTokenizerFast:
    """The LLM's own tokenizer, another one, or a byte-level BPE trained on the samples."""
    if isinstance(spec.tokenizer, TokenizerSpec):
        return train_tokenizer(template, samples(), spec.tokenizer.vocab_size)
    tokenizer = found("tokenizer", spec.tokenizer or spec.name, AutoTokenizer.from_pretrained)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def fit_vocabulary(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, stated: dict[str, Any]
) -> PreTrainedConfig:
    """Give a config the tokenizer's size and special ids where the recipe does not state them."""
    fields = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in fields.items():
        if name not in stated:
            setattr(config, name, value)
    return config


def found(part: str, name: str, load: Callable, **kwargs: Any) -> Any:
    """`load(name)`, with one clear line when neither a directory nor the Hub has it."""
    name = located(part, name)
    if name.endswith(".gguf"):
        name = str(gguf.converted(Path(name).expanduser()))
    local = Path(name).is_dir()
    try:
        return load(name, local_files_only=not local and not hub_answers(), **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if local else "neither a directory nor on the Hub"
        if not local and not hub_answers():
            reason = "no such directory, not in the Hub's cache, and the Hub cannot be reached"
        raise UserError(
            f"cannot load the {PART_NAMES[part]} '{name}': {reason}."
            f" Give a local directory: model.{PART_KEYS.get(part, part)}=/path/to/{name.rstrip('/').rsplit('/', 1)[-1]}"
        ) from None


def located(part: str, name: str) -> str:
    """Where the part `name` lies: `nano` in the package, anything else where it says (`./nano` is your own folder)."""
    return str(NANO_FOLDER / PART_FOLDERS.get(part, part)) if name == NANO else name


@cache
def hub_answers() -> bool:
    """Whether the Hub can be reached: unasked, every file would cost half a minute of retries offline."""
    if HF_HUB_OFFLINE:
        return False
    try:
        hub = urlsplit(ENDPOINT)
        socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()
    except OSError:
        return bool(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"))
    return True


def config_of(part: str, fields: dict[str, Any]) -> PreTrainedConfig:
    """A transformers config from a recipe's mapping; `model_type` says which."""
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise UserError(
            f"model.{part}.config needs `model_type`, the transformers name of the architecture, like llama."
        )
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise UserError(f"model.{part}.config: transformers knows no model_type '{model_type}'.") from None
    wrong = [name for name in fields if not hasattr(known, name)]
    if wrong:
        known_names = [name for name in known.to_dict() if not name.startswith("_")]
        raise UserError(
            f"model.{part}.config: {model_type} has no field {', '.join(wrong)}{nearest(wrong[0], known_names)}"
        )
    return AutoConfig.for_model(model_type, **fields)


def train_tokenizer(template: Template, samples: Iterable[Sample], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` entries, trained on the samples as `template` writes them: it can write
    any text.
    """

    def made(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")

    specials = ["<s>", "</s>", "<pad>", IMAGE_TOKEN]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    kwargs = {"special_tokens": specials, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=len(specials) + 256, **kwargs))
    bytes_only = made(tokenizer)
    rendered = (template.render(sample, bytes_only)[0] for sample in islice(samples, TOKENIZER_SAMPLES))
    pattern = re.compile("|".join(map(re.escape, specials)))
    texts = (piece for text in rendered for piece in pattern.split(text) if piece)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **kwargs))
    return made(tokenizer)
