"""From a recipe's three boxes to one model and its processor.

    llm + vision_tower + connector  ->  TinyLlavaForConditionalGeneration, TinyLlavaProcessor

Parts come from a Hub id, a local directory, or a config with random weights. Whatever an LLM computes after its last
hidden state is found by comparing logits, never believed from a list of names.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinyllava.config import ModelSpec, VisionTowerSpec
from tinyllava.data.sample import Sample
from tinyllava.data.template import Template, add_image_token
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.model.modeling import TinyLlavaConfig, TinyLlavaForConditionalGeneration
from tinyllava.model.parts import fit_vocabulary, hub_answers, load_part, load_tokenizer, part_config, tower_names
from tinyllava.model.processor import TinyLlavaProcessor, build_processor, image_processor

logger = logging.getLogger("tinyllava")
TOKENIZER_SAMPLES = 20_000  # enough for a small vocabulary, a few seconds to render
PART_NAMES = {"llm": "LLM", "vision_tower": "vision tower", "tokenizer": "tokenizer"}
PART_KEYS = {"tokenizer": "llm.tokenizer"}
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(
    spec: ModelSpec, samples: Callable[[], Iterable[Sample]] = list, seed: int = 42, empty: bool = False
) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor, Template]:
    """Assemble the model of a recipe. `samples` yields training samples, for a tokenizer that is trained with the
    model.

    The seed covers every weight that is not loaded: random parts and the connector. With `empty` no weights are made
    or read (they lie on the meta device): enough to count and to prepare data. Raises UserError for parts that cannot
    be found, do not fit together, or compute what the model class cannot hold.
    """
    llm_config = part_config("llm", spec.llm)
    tower_config = part_config("vision_tower", spec.vision_tower)
    family = tower_family(tower_config)
    template = Template.load(spec.template or default_template(llm_config), compat=spec.compat)
    tokenizer = load_tokenizer(spec.llm, template, samples)
    image_token_id = add_image_token(tokenizer)
    if spec.llm.config is not None:  # the config's LLM is as wide as its tokenizer, unless it says otherwise
        llm_config = fit_vocabulary(llm_config, tokenizer, spec.llm.config)
    set_seed(seed)
    with torch.device("meta") if empty else nullcontext():
        llm = load_part("llm", spec.llm, llm_config, AutoModelForCausalLM, spec.dtype, empty)
        tower = load_part("vision_tower", spec.vision_tower, tower_config, AutoModel, spec.dtype, empty)
        if image_token_id >= llm.get_input_embeddings().num_embeddings:  # Qwen and Phi have spare rows
            llm.resize_token_embeddings(len(tokenizer), mean_resizing=not empty)
    fields, image_size = tower_images(spec.vision_tower, tower.config)
    patches_only = spec.vision_tower.feature_strategy == "patch" and family.prefix_tokens(tower.config) > 0
    connector = copy.deepcopy(spec.connector)
    if tower.config.model_type == "mof" and "mof_mlp" in connector:  # which cannot see where a tower's channels end
        layers = spec.vision_tower.feature_layer
        width = tower.config.first.hidden_size * (1 if isinstance(layers, int) else len(layers))
        connector["mof_mlp"].setdefault("first_dim", width)
    config = TinyLlavaConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=copy.deepcopy(llm.config),
        connector=connector,
        prefix_tokens=family.prefix_tokens(tower.config),
        image_size=image_size,
        image_mean=list(fields["image_mean"]),
        image_std=list(fields["image_std"]),
        image_token_index=image_token_id,
        vision_feature_layer=spec.vision_tower.feature_layer,
        vision_feature_select_strategy="default" if patches_only else "full",
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
        **({"head_bias": llm.get_output_embeddings().bias is not None} if empty else head_of(llm)),
    )
    check_feature_layers(config)
    with torch.device("meta") if empty else nullcontext():
        model = assemble(config, llm, tower, seed)
    config.image_seq_length = model.model.multi_modal_projector.num_tokens(config.num_patches)
    processor = build_processor(
        config,
        image_processor(fields, image_size, spec.vision_tower.image_aspect),
        tokenizer,
        template.chat_template(tokenizer),
        config.image_seq_length,
    )
    return model, processor, template


def assemble(
    config: TinyLlavaConfig, llm: PreTrainedModel, tower: PreTrainedModel, seed: int
) -> TinyLlavaForConditionalGeneration:
    """Put loaded parts into an empty model, and initialise the connector as the LLM initialises its own linear
    layers.
    """
    with torch.device("meta"):
        model = TinyLlavaForConditionalGeneration(config)
    ((name, options),) = config.connector.items()
    connector, options = Factory("connectors").resolve(name, options)
    layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    set_seed(seed)  # whatever was drawn before (random parts or none), the connector starts from the same weights
    projector = connector(config.vision_config.hidden_size * layers, config.text_config.hidden_size, **options)
    projector.apply(model._init_weights)
    model.model.vision_tower = tower
    model.model.language_model = llm.base_model
    model.model.multi_modal_projector = projector.to(dtype=llm.dtype)
    model.lm_head = llm.get_output_embeddings()
    model.config.vision_config, model.config.text_config = tower.config, llm.config
    model.config.dtype = llm.dtype
    if llm.generation_config is not None:
        model.generation_config = llm.generation_config
    model.generation_config.suppress_tokens = [config.image_token_id]  # a placeholder is never an answer
    model.tie_weights()
    return model


def tower_family(config: PreTrainedConfig) -> Any:
    """What the package knows about a tower, by its config's model_type."""
    return Factory("vision_towers").get(config.model_type.removesuffix("_vision_model").removesuffix("_vision"))


def default_template(config: PreTrainedConfig) -> str:
    """The template of an LLM family, when a recipe names none: its file's, else the tokenizer's own chat template."""
    llms = Factory("llms")
    return llms.get(config.model_type).template if config.model_type in llms.names() else "native"


def tower_images(spec: VisionTowerSpec, config: PreTrainedConfig) -> tuple[dict, int]:
    """Fields of the image processor, from the tower's own where it has one, and the side of the picture it makes."""
    own: dict[str, Any] = {}
    if spec.name is not None:
        name = tower_names(spec.name)[0]
        try:
            own = AutoImageProcessor.from_pretrained(name, backend="pil", local_files_only=not hub_answers()).to_dict()
        except OSError:
            logger.info("%s has no image processor of its own: using the family's settings", name)
    return image_fields(config, own)


def image_fields(config: PreTrainedConfig, own: Mapping[str, Any]) -> tuple[dict, int]:
    """The family's image processor with the fields of a Hugging Face one over it, and the side of the picture."""
    names = ("size", "crop_size", "do_center_crop", "image_mean", "image_std", "resample")
    fields = tower_family(config).image_processor(config) | {
        name: own[name] for name in names if own.get(name) is not None
    }
    cropped = fields.get("do_center_crop") and fields.get("crop_size")
    side = (fields["crop_size"] if cropped else fields["size"]).get("height", config.image_size)
    return fields, side


def check_feature_layers(config: TinyLlavaConfig) -> None:
    """Raise UserError when the tower lacks a layer that the recipe asks for."""
    layers = config.vision_config.num_hidden_layers
    wanted = config.vision_feature_layer
    for layer in [wanted] if isinstance(wanted, int) else wanted:
        if not -layers - 1 <= layer <= layers:
            raise UserError(
                f"vision_tower.feature_layer {layer}: the tower has {layers} layers."
                f" Ask for one of {-layers - 1} .. {layers}."
            )


@torch.no_grad()
def head_of(llm: PreTrainedModel) -> dict[str, Any]:
    """What the LLM does between its last hidden state and its logits: bias, scale, soft cap. Raises UserError for
    anything else.

    Llava keeps the base model and one linear layer; Phi-2's bias, Granite's scaling and Gemma2's cap would silently be
    lost.
    """
    head = llm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(llm).__name__} has no linear output head: it cannot be the LLM of a Llava model.")
    was_training = llm.training
    llm.eval()
    ids = torch.arange(8, device=llm.device).unsqueeze(0) % llm.config.vocab_size
    wanted = llm(ids, use_cache=False).logits.float()
    plain = head(llm.base_model(ids, use_cache=False).last_hidden_state).float()
    llm.train(was_training)
    bias = {"head_bias": head.bias is not None}
    scale = ((wanted * plain).sum() / (plain * plain).sum()).item()
    for exact in (
        1.0,
        getattr(llm.config, "logit_scale", None),
        1.0 / getattr(llm.config, "logits_scaling", 1.0),
        scale,
    ):
        if exact is not None and _equal(wanted, plain * exact, llm.dtype):
            return bias | {"head_scale": float(exact)}
    cap = getattr(llm.config, "final_logit_softcapping", None)
    if cap and _equal(wanted, torch.tanh(plain / cap) * cap, llm.dtype):
        return bias | {"head_softcap": float(cap)}
    raise UserError(
        f"{type(llm).__name__} changes its logits in a way the model class cannot hold"
        f" (off by {(wanted - plain).abs().max():.2g})."
        " It needs a file in llms/ and a place in TinyLlavaConfig."
    )


def _equal(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of the same logits agree, but for rounding (a soft cap of 30 changes small logits by
    1e-4).
    """
    return bool((a - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm())
