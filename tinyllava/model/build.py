"""Build a VLM from a recipe's `model:` section: vision tower + connector + LLM, with tokenizer and image processor.

    build(spec)  ->  VLM(model, processor, template)

Each part comes from a Hub id, a local directory, or a config with random weights.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from tinyllava.config import NATIVE_TEMPLATE, ModelSpec
from tinyllava.data.sample import IMAGE_TOKEN
from tinyllava.data.special_tokens import add_own_tokens, has_token
from tinyllava.data.template import Template, add_image_token
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.head import probe_head
from tinyllava.model.image_processor import is_code, load_image_processor
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration, make_connector
from tinyllava.model.parts import find_own_families, fit_vocabulary, load_part, load_tokenizer, read_part_config
from tinyllava.model.processor import build_processor
from tinyllava.model.vlm import VLM
from tinyllava.vision_towers import find_family


@dataclass
class LoadedParts:
    """Vision tower, LLM and tokenizer. Every token, `<image>` too, has a row in the LLM's embeddings."""

    vision_tower: PreTrainedModel
    llm: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    image_token_id: int
    new_tokens: list[int]  # ids of the rows that the LLM did not have before


def build(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerFast | None = None, seed: int = 42, empty: bool = False
) -> VLM:
    """Build the model of a recipe from its vision tower, connector and LLM.

    tokenizer: replaces the LLM's own; required if the recipe trains one (`train.start.make_tokenizer`). seed: of every
    weight that is not loaded (random parts and the connector). empty: make and read no weights; they stay on the meta
    device, which is enough to count parameters and to prepare data. Raises UserError for parts that cannot be found, do
    not fit together, or compute something that the model class cannot.
    """
    # First, because it imports the user's own connector: an error there must come before the downloads.
    Factory("connectors").resolve(*next(iter(spec.connector.items())))
    template = load_template(spec)
    parts = load_parts(spec, tokenizer, seed, empty)
    images, image_size = load_image_processor(spec.vision_tower, parts.vision_tower.config)

    config = make_config(spec, parts, images, image_size, empty)
    check_feature_layers(config)
    with torch.device("meta") if empty else nullcontext():
        model = assemble(config, parts, seed)
    config.image_seq_length = model.model.multi_modal_projector.num_tokens(config.num_patches)

    chat_template = template.get_chat_template(parts.tokenizer)
    processor = build_processor(config, images, parts.tokenizer, chat_template, config.image_seq_length)
    return VLM(model, processor, template)


def load_template(spec: ModelSpec) -> Template:
    """Load the template that a recipe names, else the default of its LLM's family."""
    return Template.load(spec.template or get_default_template(read_part_config("llm", spec.llm)), compat=spec.compat)


def get_default_template(config: PreTrainedConfig) -> str:
    """The template when a recipe names none: that of the LLM's family, else the tokenizer's own chat template."""
    llms = Factory("llms")
    return llms.get(config.model_type).template if config.model_type in llms.list_names() else NATIVE_TEMPLATE


def load_parts(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast | None, seed: int, empty: bool) -> LoadedParts:
    """Load vision tower, LLM and tokenizer, and add `<image>` and the recipe's tokens to tokenizer and embeddings."""
    llm_config = read_part_config("llm", spec.llm)
    tower_config = read_part_config("vision_tower", spec.vision_tower)
    find_family(tower_config)  # raises an error for an unknown family before weights are downloaded
    tokenizer = tokenizer or load_tokenizer(spec.llm)
    knew_images = has_token(tokenizer, IMAGE_TOKEN)
    image_token_id = add_image_token(tokenizer)
    own_tokens = add_own_tokens(tokenizer, spec.add_tokens)
    if spec.llm.config is not None:  # an LLM from a config has the vocabulary of its tokenizer by default
        fit_vocabulary(llm_config, tokenizer, spec.llm.config)
    set_seed(seed)
    with torch.device("meta") if empty else nullcontext():  # which has only shapes
        llm = load_part("llm", spec.llm, llm_config, AutoModelForCausalLM, spec.dtype, empty)
        tower = load_part("vision_tower", spec.vision_tower, tower_config, AutoModel, spec.dtype, empty)
        rows, needed = llm.get_input_embeddings().num_embeddings, max(len(tokenizer), image_token_id + 1)
        if needed > rows:  # Qwen and Phi have spare rows, most others have none
            llm.resize_token_embeddings(needed, mean_resizing=not empty)
    fill_rows(llm, own_tokens)
    new_tokens = sorted({*range(rows, needed), *([] if knew_images else [image_token_id]), *own_tokens})
    return LoadedParts(tower, llm, tokenizer, image_token_id, new_tokens)


@torch.no_grad()
def fill_rows(model: PreTrainedModel, ids: list[int]) -> None:
    """Let new tokens start from the mean of all tokens before them, in the embeddings and in the output head.

    Rows that an LLM has to spare were never trained: their logits are arbitrary.
    """
    head = model.get_output_embeddings()
    for tensor in (model.get_input_embeddings().weight, head.weight, head.bias):
        if ids and tensor is not None:
            tensor[ids] = tensor[: min(ids)].mean(0, dtype=torch.float32).to(tensor.dtype)


def add_tokens(vlm: VLM, tokens: list[str]) -> None:
    """Add a recipe's own tokens to a finished model, in place. Raises UserError if its head cannot get rows."""
    model, ids = vlm.model, add_own_tokens(vlm.tokenizer, tokens)
    if ids and model.config.head_rows is not None:
        rows = model.config.head_rows
        raise UserError(f"model.add_tokens: this checkpoint of the original never answers with a token above {rows}.")
    if max(ids, default=0) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    fill_rows(model, ids)
    model.config.new_tokens = sorted({*(model.config.new_tokens or []), *ids})


def make_config(
    spec: ModelSpec, parts: LoadedParts, images: BaseImageProcessor, image_size: int, empty: bool
) -> TinyLlavaConfig:
    """The config of the whole model. image_size: pixels a side of the images that the image processor returns."""
    llm, tower, vision = parts.llm, parts.vision_tower, spec.vision_tower
    prefix_tokens = find_family(tower.config).prefix_tokens(tower.config)
    patches_only = vision.feature_strategy == "patch" and prefix_tokens > 0
    # Without weights there are no logits to compare, so only the bias is known.
    head = {"head_bias": llm.get_output_embeddings().bias is not None} if empty else probe_head(llm)
    return TinyLlavaConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=copy.deepcopy(llm.config),
        connector=complete_connector(spec, tower.config),
        prefix_tokens=prefix_tokens,
        image_size=image_size,
        image_mean=list(images.image_mean),
        image_std=list(images.image_std),
        image_processor=vision.image_processor if is_code(vision.image_processor) else None,
        tiles=vision.tiles,
        image_token_index=parts.image_token_id,
        new_tokens=parts.new_tokens,
        families=find_own_families(spec, llm=llm.config, vision_tower=tower.config),
        vision_feature_layer=vision.feature_layer,
        vision_feature_select_strategy="default" if patches_only else "full",
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
        **head,
    )


def complete_connector(spec: ModelSpec, tower_config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """{name: options} of the connector, completed with the options that follow from the vision tower."""
    ((name, options),) = copy.deepcopy(spec.connector).items()
    connector, _ = Factory("connectors").resolve(name, options)
    if hasattr(connector, "options_from_tower"):
        layers = spec.vision_tower.feature_layer
        options = connector.options_from_tower(options, tower_config, [layers] if isinstance(layers, int) else layers)
    return {name: options}


def check_feature_layers(config: TinyLlavaConfig) -> None:
    """Raise UserError when the vision tower does not have a layer that the recipe names."""
    count = config.vision_config.num_hidden_layers
    layers = config.vision_feature_layer
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -count - 1 <= layer <= count:
            raise UserError(
                f"vision_tower.feature_layer {layer}: the tower has {count} layers."
                f" Choose one of {-count - 1} .. {count}."
            )


def assemble(config: TinyLlavaConfig, parts: LoadedParts, seed: int) -> TinyLlavaForConditionalGeneration:
    """Put loaded parts into an empty model. The connector is initialised by the rule of the LLM's linear layers."""
    llm, tower = parts.llm, parts.vision_tower
    with torch.device("meta"):
        model = TinyLlavaForConditionalGeneration(config)
    set_seed(seed)  # so that the connector starts from the same weights, whether or not other parts were random
    projector = make_connector(config)
    projector.apply(model._init_weights)
    model.model.vision_tower = tower
    model.model.language_model = llm.base_model
    model.model.multi_modal_projector = projector.to(dtype=llm.dtype)
    model.lm_head = llm.get_output_embeddings()
    model.config.vision_config, model.config.text_config = tower.config, llm.config
    model.config.dtype = llm.config.dtype = llm.dtype
    tower.config.dtype = tower.dtype
    if llm.generation_config is not None:
        model.generation_config = llm.generation_config
    model.generation_config.suppress_tokens = [config.image_token_id]  # a placeholder is never part of an answer
    model.tie_weights()
    return model
