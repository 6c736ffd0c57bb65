"""Reads checkpoints of the original TinyLLaVA Factory and of its forerunner TinyLLaVABench: by key mapping, offline.

    full         config.json  model*.safetensors: language_model.*  vision_tower._vision_tower.*  connector._connector.*
    components   config.json  {language_model,vision_tower,connector}/pytorch_model.bin
    LoRA         the components and adapter_model.safetensors, which is merged: W + (alpha / r) B A
    Bench        LLaVA's flat config and names: model.layers.*  model.vision_tower.vision_tower.*  model.mm_projector.*

`checkpoint.load` comes here when config.json says so. What it gets is an ordinary model of ours, and saving that writes
an ordinary checkpoint. Hub ids in the config are not followed; what these files do not carry is given by keyword, which
the command line does not need once the model is saved:

    session = tinyllava.load(DIR, template="phi", image_processor={...}, dinov2_config={...}, qformer_config={...})
    checkpoint.save(session.model, session.processor, session.template, Path("converted"))
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

from tinyllava.data.template import Template, add_image_token
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.model.build import default_template, image_fields, tower_family
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.image_processor import llava_image_processor
from tinyllava.model.legacy_weights import CONNECTOR, TOWER, add_rows, published, read_json, read_state, resample
from tinyllava.vision_towers.mof import MofConfig

logger = logging.getLogger("tinyllava")
TEMPLATES = ("pretrain", "phi", "llama", "gemma", "qwen2_base", "qwen2_instruct")
# The original left out what equals the class default of transformers 4.40.1; these defaults have changed since.
THEN = {"dinov2": {"patch_size": 16}}
NOT_OF_THE_MODEL = ("model_type", "torch_dtype", "transformers_version")
ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # one field today, which the old names still fill
QFORMER = (  # fields that BERT's config and the Q-Former's share
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
)
BENCH_NAMES = {
    "model.vision_tower.vision_tower.": TOWER,
    "model.mm_projector.": CONNECTOR,
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
BENCH_FIELDS = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}  # of its own StableLM
SO400M = {  # TinyLLaVABench's SigLIP has this in its code
    **{"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27},
    **{"num_attention_heads": 16, "image_size": 384, "patch_size": 14},
}


class Legacy(NamedTuple):
    """What a directory of the original holds, as today's classes take it."""

    config: TinyLlavaConfig
    state: dict[str, Tensor]  # under the names of today's checkpoints
    images: LlavaImageProcessorPil
    tokenizer: PreTrainedTokenizerBase
    template: Template
    generation: GenerationConfig


def is_legacy(directory: Path) -> bool:
    """Whether config.json is the original's or TinyLLaVABench's. What the directory is called says nothing."""
    path = directory / "config.json"
    if not path.is_file():
        return False
    config = read_json(path)
    return config.get("model_type") == "tinyllava" or "mm_vision_tower" in config or "mm_projector_type" in config


def read(
    directory: Path,
    template: str | None = None,
    image_processor: Mapping[str, Any] | None = None,
    dinov2_config: Mapping[str, Any] | None = None,
    qformer_config: Mapping[str, Any] | None = None,
    vision_config: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
) -> Legacy:
    """A directory for which `is_legacy`. Raises UserError when it is not whole or more must be given.

    template: by default the LLM family's. image_processor: fields of a Hugging Face one, over the tower's usual ones.
    The configs are those of a mixture's DINOv2, of the Q-Former's BERT (default: BERT base) and, for TinyLLaVABench,
    of the tower (default: SigLIP so400m-patch14-384). tokenizer: another directory that has one.
    """
    written, state = read_json(directory / "config.json"), read_state(directory)
    bench = written.get("model_type") != "tinyllava"
    fields = _with_component_configs(written, directory)
    if bench:
        fields, state = _from_bench(written, state, vision_config)
    elif vision_config:
        fields["vision_config"] = {**fields["vision_config"], **vision_config}
    llm = config_of(fields["text_config"])
    tower, pixels, side = _tower(fields["vision_config"], state, image_processor or {}, dinov2_config)

    tokens = _tokenizer(Path(tokenizer or directory))
    image_id, rows = add_image_token(tokens), llm.vocab_size
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(llm)
    llm.architectures = [type(empty).__name__]
    name = fields.get("connector_type") or "linear"
    options = _connector_options(name, fields, state, qformer_config)
    connector, _ = Factory("connectors").resolve(name, options)
    state = published(state, empty, connector)
    if image_id >= rows:
        add_rows(state, empty, image_id + 1 - rows)
        llm.vocab_size = image_id + 1

    prefix = tower_family(tower).prefix_tokens(tower)
    patches_only = fields.get("vision_feature_select_strategy", "patch") == "patch"
    config = TinyLlavaConfig(
        text_config=llm,
        vision_config=tower,
        connector={name: options},
        prefix_tokens=prefix,
        drop_first_patch=patches_only and prefix == 0 and tower.model_type != MofConfig.model_type,
        image_scale=llm.hidden_size**0.5 if llm.model_type == "gemma" else 1.0,
        head_bias=empty.get_output_embeddings().bias is not None,
        head_rows=rows if image_id >= rows else None,
        image_size=side,
        image_mean=list(pixels["image_mean"]),
        image_std=list(pixels["image_std"]),
        image_token_index=image_id,
        vision_feature_layer=fields.get("vision_feature_layer", -2),
        vision_feature_select_strategy="default" if patches_only else "full",
        tie_word_embeddings=bool(llm.tie_word_embeddings),
    )
    generation = GenerationConfig(
        bos_token_id=llm.bos_token_id,
        eos_token_id=llm.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        suppress_tokens=[image_id] if image_id >= rows else [],  # a row that the original had, it could answer with
    )
    images = llava_image_processor(pixels, side, _aspect(fields))
    return Legacy(config, state, images, tokens, _template(template, llm, tokens, bench), generation)


LACKING = list(inspect.signature(read).parameters)[1:]  # what `read` takes beside the directory


def config_of(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """Today's config from one of transformers 4.40.1, whose class defaults stand for the fields that are absent."""
    model_type = fields.get("model_type")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise UserError(f"transformers knows no model_type '{model_type}'.") from None
    fields = {**THEN.get(model_type, {}), **fields}
    if model_type == "gemma":  # its MLP used to read `hidden_activation`, and reads `hidden_act` today
        fields["hidden_act"] = fields.pop("hidden_activation", None) or "gelu_pytorch_tanh"
    named = [name for name in fields if not name.startswith("_") and name not in NOT_OF_THE_MODEL]
    kept = {name: fields[name] for name in named if name in ROPE or hasattr(known, name)}
    return AutoConfig.for_model(model_type, **kept)


def _with_component_configs(written: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The root's config, with the complete ones of the component folders where there are any."""
    fields = dict(written)
    for field, part in (("text_config", "language_model"), ("vision_config", "vision_tower")):
        own = directory / part / "config.json"
        fields[field] = {**(fields.get(field) or {}), **(read_json(own) if own.is_file() else {})}
    return fields


def _tower(
    fields: Mapping[str, Any],
    state: dict[str, Tensor],
    image_processor: Mapping[str, Any],
    dinov2_config: Mapping[str, Any] | None,
) -> tuple[PreTrainedConfig, dict[str, Any], int]:
    """The tower's config, the image processor's fields and the side of its pictures.

    Position embeddings of a DINOv2 in `state` are made to fit that side.
    """
    tower = config_of(fields)
    pixels, side = image_fields(tower, image_processor)
    if tower.model_type == "dinov2":
        state |= resample(state, f"{TOWER}embeddings.position_embeddings", side // tower.patch_size)
        tower.image_size = side
    if not any(name.startswith(f"{TOWER}dinov2.") for name in state):
        return tower, pixels, side
    if dinov2_config is None:
        raise UserError(
            "this checkpoint has a mixture of two towers and does not carry its DINOv2's config. Give it, as the"
            " config.json of facebook/dinov2-large has it: tinyllava.load(DIR, dinov2_config={...})."
        )
    second = config_of({"model_type": "dinov2", **dinov2_config})
    state |= resample(state, f"{TOWER}dinov2.embeddings.position_embeddings", side // second.patch_size)
    second.image_size = side
    same = {name: [list(pixels[name])] * 2 for name in ("image_mean", "image_std")}  # its DINOv2 sees CLIP's pixels
    return MofConfig(first=tower, second=second, **same), pixels, side


def _connector_options(
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
                f"this checkpoint's Q-Former is {queries.shape[-1]} wide, not {width}, and does not carry its BERT's"
                " config. Give it: tinyllava.load(DIR, qformer_config={'hidden_size': ..., ...})."
            )
        return {"num_queries": fields["num_queries"], **bert}
    return {}


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The fast version of the slow tokenizer there, of the class that tokenizer_config.json names."""
    try:  # an empty config: the LLM's model_type would overrule that class
        return AutoTokenizer.from_pretrained(directory, config=PreTrainedConfig(), local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{directory} has no tokenizer that transformers can load ({reason}). Give a directory that has:"
            " tinyllava.load(DIR, tokenizer=...)."
        ) from None


def _aspect(fields: Mapping[str, Any]) -> str:
    """How pictures become squares: `square` was the processor's own way, for CLIP with a crop."""
    name = fields.get("image_aspect_ratio") or "square"
    known = {"square": "processor", "pad": "pad"}
    if name not in known:
        raise UserError(f"this checkpoint asks for image_aspect_ratio {name}, which the original could not run.")
    return known[name]


def _template(name: str | None, llm: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, bench: bool) -> Template:
    """The given template, or the family's; one of the original's own gives the original's ids."""
    if name is None:
        name = default_template(llm)
        if name == "qwen2_base" and tokenizer.eos_token == "<|im_end|>":
            name = "qwen2_instruct"
        if name not in TEMPLATES or (bench and name == "llama"):  # LLaVA had several for Llama
            raise UserError(
                "this checkpoint does not say which template it was trained with. Give it, one of"
                f" {', '.join(TEMPLATES)} or your own: tinyllava.load(DIR, template=...)."
            )
        logger.info("this checkpoint does not say its template: taking %s, as the original does for its LLM", name)
    return Template.load(name, compat=name in TEMPLATES)


def _from_bench(
    written: Mapping[str, Any], state: Mapping[str, Tensor], vision_config: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """TinyLLaVABench's config and weights (LLaVA's, too) as the Factory's.

    Its SigLIP lacks the last layer and the head, and gives all patches of what is then the last layer.
    """
    if written.get("mm_projector_type") == "resampler":
        raise UserError("this checkpoint has TinyLLaVABench's own resampler, which nothing reads any more.")
    renamed = {}
    for name, tensor in state.items():
        old = next((prefix for prefix in BENCH_NAMES if name.startswith(prefix)), "")
        renamed[BENCH_NAMES.get(old, "") + name.removeprefix(old)] = tensor
    family = written["model_type"].removeprefix("tiny_").removeprefix("tinyllava").removeprefix("llava").strip("_")
    text = {BENCH_FIELDS.get(name, name): value for name, value in written.items()}
    fields = {
        "text_config": {**text, "model_type": {"": "llama", "qwen": "qwen2"}.get(family, family)},
        "connector_type": written.get("mm_projector_type"),
        "image_aspect_ratio": written.get("image_aspect_ratio"),
    }
    layers = {
        name.split(".layers.")[1].split(".")[0] for name in renamed if name.startswith(TOWER) and ".layers." in name
    }
    if not layers:
        raise UserError(
            "this checkpoint holds no vision tower, and the Hub is not asked for one. Use a whole checkpoint."
        )
    if f"{TOWER}vision_model.embeddings.class_embedding" in renamed:
        if vision_config is None:
            raise UserError(
                "this checkpoint does not carry its CLIP's config. Give it, as the vision_config in the config.json of"
                " openai/clip-vit-large-patch14-336: tinyllava.load(DIR, vision_config={...})."
            )
        fields["vision_config"] = {"model_type": "clip_vision_model", **vision_config}
        fields["vision_feature_layer"] = written.get("mm_vision_select_layer", -2)
        fields["vision_feature_select_strategy"] = written.get("mm_vision_select_feature", "patch")
    else:
        tower = {**SO400M, **(vision_config or {})}
        fields["vision_feature_layer"] = tower["num_hidden_layers"] - 1
        fields["vision_feature_select_strategy"] = "cls_patch"
        has_head = any(name.startswith(f"{TOWER}vision_model.head.") for name in renamed)
        fields["vision_config"] = {**tower, "num_hidden_layers": len(layers), "vision_use_head": has_head}
    return fields, renamed
