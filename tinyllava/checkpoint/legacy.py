"""Read checkpoints of the original TinyLLaVA Factory and of TinyLLaVABench before it: by key mapping, offline.

    full         config.json  model*.safetensors: language_model.*  vision_tower._vision_tower.*  connector._connector.*
    components   config.json  {language_model,vision_tower,connector}/pytorch_model.bin
    LoRA         the components and adapter_model.safetensors, which is merged: W + (alpha / r) B A
    Bench        LLaVA's flat config and names: model.layers.*  model.vision_tower.vision_tower.*  model.mm_projector.*

`checkpoint.load` calls `read_legacy` when config.json shows such a checkpoint. The result is an ordinary VLM, and
saving it writes an ordinary checkpoint. Hub ids in the config are not followed. Values that these files do not contain
are passed as keywords. A converted checkpoint no longer needs them:

    session = tinyllava.load(DIR, template="phi", image_processor={...}, dinov2_config={...}, qformer_config={...})
    checkpoint.save(session.vlm, Path("converted"))
"""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2QFormerConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tinyllava.checkpoint.legacy_bench import convert_bench
from tinyllava.checkpoint.legacy_weights import (
    CONNECTOR,
    TOWER,
    add_image_rows,
    read_state,
    rename_weights,
    resample_positions,
)
from tinyllava.data.legacy_template import ORIGINALS
from tinyllava.data.template import Template, add_image_token
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.files import raise_value_errors, read_json
from tinyllava.model.build import get_default_template
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.image_processor import combine_image_fields, make_llava_image_processor
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processor import build_processor
from tinyllava.model.vlm import VLM
from tinyllava.runs import RECORD
from tinyllava.vision_towers import find_family, import_tower
from tinyllava.vision_towers.mof import MofConfig

logger = logging.getLogger("tinyllava")
# The original did not save fields with the defaults of transformers 4.40.1, which have changed since.
OLD_DEFAULTS = {"dinov2": {"patch_size": 16}}
NOT_OF_THE_MODEL = ("model_type", "torch_dtype", "transformers_version")
# One field today. transformers still reads the old names.
ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")
QFORMER = (  # fields that BERT's config and the Q-Former's share
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
)


class Tower(NamedTuple):
    """A vision tower of the original."""

    config: PreTrainedConfig
    pixels: dict[str, Any]  # fields of its image processor
    side: int  # pixels a side of its images


class Legacy(NamedTuple):
    """What a directory of the original contains, in the form of today's classes."""

    config: TinyLlavaConfig
    state: dict[str, Tensor]  # under the names of today's checkpoints
    images: LlavaImageProcessorPil
    tokenizer: PreTrainedTokenizerBase
    template: Template
    generation: GenerationConfig


def is_legacy(directory: Path) -> bool:
    """Whether config.json is the original's or TinyLLaVABench's. The name of the directory does not matter."""
    path = directory / "config.json"
    if not path.is_file() or (directory / RECORD).exists():
        return False
    config = read_json(path)
    return config.get("model_type") == "tinyllava" or "mm_vision_tower" in config or "mm_projector_type" in config


def read_legacy(
    directory: Path,
    template: str | None = None,
    image_processor: Mapping[str, Any] | None = None,
    dinov2_config: Mapping[str, Any] | None = None,
    qformer_config: Mapping[str, Any] | None = None,
    vision_config: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
) -> Legacy:
    """Read a directory for which `is_legacy` is true. Raises UserError if files or values are missing.

    template: default: the LLM family's. image_processor: fields that replace those of the tower's. dinov2_config: of a
    mixture's DINOv2. qformer_config: of the Q-Former's BERT (default: BERT base). vision_config: of TinyLLaVABench's
    tower (default: SigLIP so400m-patch14-384). tokenizer: another directory that has one.
    """
    written, state = read_json(directory / "config.json"), read_state(directory)
    is_bench = written.get("model_type") != "tinyllava"
    fields = _add_component_configs(written, directory)
    if is_bench:
        fields, state = convert_bench(written, state, vision_config)
    elif vision_config:
        fields["vision_config"] = {**fields["vision_config"], **vision_config}
    llm = convert_config(fields["text_config"])
    tower = _convert_tower(fields["vision_config"], state, image_processor or {}, dinov2_config)

    tokens = _load_tokenizer(Path(tokenizer or directory))
    image_id, rows = add_image_token(tokens), llm.vocab_size
    with torch.device("meta"):
        empty_llm = AutoModelForCausalLM.from_config(llm)
    llm.architectures = [type(empty_llm).__name__]
    connector = fields.get("connector_type") or "linear"
    options = _get_connector_options(connector, fields, state, qformer_config)
    connector_class, _ = Factory("connectors").resolve(connector, options)
    state = rename_weights(state, empty_llm, connector_class)
    if image_id >= rows:
        add_image_rows(state, empty_llm, image_id + 1 - rows)
        llm.vocab_size = image_id + 1

    config = _make_config(fields, llm, tower, {connector: options}, image_id)
    config.head_bias = empty_llm.get_output_embeddings().bias is not None
    config.head_rows = rows if image_id >= rows else None
    generation = GenerationConfig(
        bos_token_id=llm.bos_token_id,
        eos_token_id=llm.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        # If the original already had a row for this id, its answers could contain the id: that must not change.
        suppress_tokens=[image_id] if image_id >= rows else [],
    )
    images = make_llava_image_processor(tower.pixels, tower.side, _get_aspect(fields))
    return Legacy(config, state, images, tokens, _choose_template(template, llm, tokens, is_bench), generation)


def complete_vlm(original: Legacy, model: TinyLlavaForConditionalGeneration) -> VLM:
    """The VLM of a directory of the original, whose weights are in `model`."""
    model.generation_config, tokenizer = original.generation, original.tokenizer
    tokens = model.model.multi_modal_projector.num_tokens(original.config.num_patches)
    model.config.image_seq_length = tokens
    chat_template = original.template.get_chat_template(tokenizer)
    processor = build_processor(model.config, original.images, tokenizer, chat_template, tokens)
    return VLM(model.eval(), processor, original.template)


def _make_config(
    fields: Mapping[str, Any], llm: PreTrainedConfig, tower: Tower, connector: dict[str, dict], image_id: int
) -> TinyLlavaConfig:
    prefix = find_family(tower.config).prefix_tokens(tower.config)
    patches_only = fields.get("vision_feature_select_strategy", "patch") == "patch"
    return TinyLlavaConfig(
        text_config=llm,
        vision_config=tower.config,
        connector=connector,
        prefix_tokens=prefix,
        drop_first_patch=patches_only and prefix == 0 and tower.config.model_type != MofConfig.model_type,
        image_scale=llm.hidden_size**0.5 if llm.model_type == "gemma" else 1.0,
        image_size=tower.side,
        image_mean=list(tower.pixels["image_mean"]),
        image_std=list(tower.pixels["image_std"]),
        image_token_index=image_id,
        vision_feature_layer=fields.get("vision_feature_layer", -2),
        vision_feature_select_strategy="default" if patches_only else "full",
        tie_word_embeddings=bool(llm.tie_word_embeddings),
    )


KEYWORDS = list(inspect.signature(read_legacy).parameters)[1:]  # of `read_legacy`, without the directory


def convert_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """Today's config from a config of transformers 4.40.1, with the defaults of that version for missing fields."""
    model_type = fields.get("model_type")
    Factory("llms").import_file(model_type)
    import_tower(model_type)
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise UserError(f"transformers does not know the model_type '{model_type}'.") from None
    fields = {**OLD_DEFAULTS.get(model_type, {}), **fields}
    if model_type == "gemma":  # its MLP read `hidden_activation` then, and reads `hidden_act` today
        fields["hidden_act"] = fields.pop("hidden_activation", None) or "gelu_pytorch_tanh"
    named = [name for name in fields if not name.startswith("_") and name not in NOT_OF_THE_MODEL]
    kept = {name: fields[name] for name in named if name in ROPE or hasattr(known, name)}
    return AutoConfig.for_model(model_type, **kept)


def _add_component_configs(written: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The root's config, completed by the configs of the component folders where they exist."""
    fields = dict(written)
    for field, part in (("text_config", "language_model"), ("vision_config", "vision_tower")):
        path = directory / part / "config.json"
        fields[field] = {**(fields.get(field) or {}), **(read_json(path) if path.is_file() else {})}
    return fields


def _convert_tower(
    fields: Mapping[str, Any],
    state: dict[str, Tensor],
    image_processor: Mapping[str, Any],
    dinov2_config: Mapping[str, Any] | None,
) -> Tower:
    """The vision tower. Position embeddings of a DINOv2 in `state` are resampled to the side of its images."""
    tower = convert_config(fields)
    pixels, side = combine_image_fields(tower, image_processor)
    if tower.model_type == "dinov2":
        state |= resample_positions(state, f"{TOWER}embeddings.position_embeddings", side // tower.patch_size)
        tower.image_size = side
    if not any(name.startswith(f"{TOWER}dinov2.") for name in state):
        return Tower(tower, pixels, side)
    if dinov2_config is None:
        raise UserError(
            "this checkpoint has a mixture of two towers, and the config of its DINOv2 is missing. Give the content of"
            " config.json of facebook/dinov2-large: tinyllava.load(DIR, dinov2_config={...})."
        )
    second = convert_config({"model_type": "dinov2", **dinov2_config})
    state |= resample_positions(state, f"{TOWER}dinov2.embeddings.position_embeddings", side // second.patch_size)
    second.image_size = side
    same = {name: [list(pixels[name])] * 2 for name in ("image_mean", "image_std")}  # its DINOv2 sees CLIP's pixels
    return Tower(MofConfig(first=tower, second=second, **same), pixels, side)


def _get_connector_options(
    name: str, fields: Mapping[str, Any], state: Mapping[str, Tensor], qformer_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    if name == "resampler":
        return {"num_queries": fields["num_queries"], "layers": fields["num_resampler_layers"]}
    if name == "qformer":
        bert = {field: value for field, value in (qformer_config or {}).items() if field in QFORMER}
        width = bert.get("hidden_size", Blip2QFormerConfig().hidden_size)
        queries = state.get(f"{CONNECTOR}query_tokens")
        if queries is not None and queries.shape[-1] != width:
            raise UserError(
                f"this checkpoint's Q-Former has width {queries.shape[-1]}, expected {width}, and its BERT's config is"
                " missing. Give it: tinyllava.load(DIR, qformer_config={'hidden_size': ..., ...})."
            )
        return {"num_queries": fields["num_queries"], **bert}
    return {}


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The fast version of the slow tokenizer in `directory`, by the class that tokenizer_config.json names."""
    try:  # an empty config: the LLM's model_type would overrule that class
        with raise_value_errors():
            return AutoTokenizer.from_pretrained(
                directory, config=PreTrainedConfig(), local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{directory} has no tokenizer that transformers can load ({reason}). Give a directory that has one:"
            " tinyllava.load(DIR, tokenizer=...)."
        ) from None


def _get_aspect(fields: Mapping[str, Any]) -> str:
    """How images become squares. The original's `square` means the tower's own image processor (CLIP's crops)."""
    name = fields.get("image_aspect_ratio") or "square"
    known = {"square": "processor", "pad": "pad"}
    if name not in known:
        raise UserError(f"this checkpoint asks for image_aspect_ratio {name}, which the original could not run.")
    return known[name]


def _choose_template(
    name: str | None, llm: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, is_bench: bool
) -> Template:
    """The template `name`, by default that of the LLM's family. The original's templates give the original's ids."""
    if name is None:
        name = get_default_template(llm)
        if name == "qwen2_base" and tokenizer.eos_token == "<|im_end|>":
            name = "qwen2_instruct"
        if name not in ORIGINALS or (is_bench and name == "llama"):  # LLaVA had several for Llama
            raise UserError(
                "this checkpoint does not say which template it was trained with. Give one of"
                f" {', '.join(ORIGINALS)}, or your own: tinyllava.load(DIR, template=...)."
            )
        logger.info("this checkpoint names no template: using %s, the original's template for its LLM", name)
    return Template.load(name, compat=name in ORIGINALS)
