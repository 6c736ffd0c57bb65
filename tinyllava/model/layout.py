"""The layout of a checkpoint: when it is plain llava, and what its weights are called on disk."""

import copy
import re
from collections.abc import Mapping

from torch import Tensor
from transformers import LlavaConfig

from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

PREFIXES = {"vision_tower": "vision_tower.", "connector": "multi_modal_projector.", "llm": "language_model."}
# transformers 5 lost the `vision_model.` level of these towers in memory; published checkpoints and vLLM have it.
NESTED_TOWERS = {"clip_vision_model", "siglip_vision_model"}
# It gave DINOv3's layers a level, and reads them under their published names only: given the others, it adds the level
# before `layer_scale1` as well.
DINOV3_LAYERS = re.compile(r"^(vision_tower\.(?:first\.|second\.)?)model\.layer\.")


def why_not_plain(model: TinyLlavaForConditionalGeneration) -> str | None:
    """None when transformers' own Llava computes exactly this model, else the reason in a few words."""
    config = model.config
    ((name, _),) = config.connector.items()
    projector = getattr(model.model.multi_modal_projector, "llava_projector", lambda: None)()
    if projector is None:
        return f"the connector {name} is not Llava's two-layer projector"
    for part in (config.text_config, config.vision_config):
        if not type(part).__module__.startswith("transformers."):
            return f"transformers has no {part.model_type}"
    if config.head_bias or config.head_scale != 1.0 or config.head_softcap is not None:
        return "the LLM's output head has a bias, a scale or a soft cap, which Llava's has not"
    if config.tiles:
        return "pictures are cut into tiles, and Llava sees each only whole"
    if config.image_processor:
        return f"its image processor is the code {config.image_processor}"
    if config.image_scale != 1.0:
        return "image tokens are scaled, as the original's Gemma did, and Llava's are not"
    if config.vision_feature_select_strategy == "default" and config.dropped_tokens != 1:
        return f"{config.dropped_tokens} of the tower's leading tokens are dropped, and Llava drops exactly one"
    if config.tie_word_embeddings and model.embeddings_name() != "embed_tokens":
        return "Llava ties its head to `embed_tokens`, which this LLM calls otherwise"
    if config.image_size != config.vision_config.image_size and config.vision_config.model_type in NESTED_TOWERS:
        return "the pictures are not of the tower's own size, and Llava does not interpolate positions"
    return None


def plain_config(model: TinyLlavaForConditionalGeneration) -> LlavaConfig:
    """The Llava config of a model for which `why_not_plain` is None."""
    config = model.config
    names = ("image_token_index", "image_seq_length", "vision_feature_select_strategy", "vision_feature_layer")
    plain = LlavaConfig(  # copies: a config resets the attention implementation of the configs it is given
        vision_config=copy.deepcopy(config.vision_config),
        text_config=copy.deepcopy(config.text_config),
        tie_word_embeddings=config.tie_word_embeddings,
        **{name: getattr(config, name) for name in names},
        **model.model.multi_modal_projector.llava_projector(),
    )
    plain.architectures, plain.dtype = ["LlavaForConditionalGeneration"], config.dtype
    return plain


def published_name(model: TinyLlavaForConditionalGeneration, name: str) -> str:
    """The name that a parameter in memory has on disk."""
    nested = "vision_model." if model.config.vision_config.model_type in NESTED_TOWERS else ""
    renames = {
        "model.vision_tower.": f"vision_tower.{nested}",
        "model.multi_modal_projector.": PREFIXES["connector"],
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    old = next((prefix for prefix in renames if name.startswith(prefix)), "")
    published = renames.get(old, "") + name.removeprefix(old).replace(".base_layer.", ".")
    return DINOV3_LAYERS.sub(r"\1layer.", published) if has_dinov3(model) else published


def has_dinov3(model: TinyLlavaForConditionalGeneration) -> bool:
    """Whether the tower, or one of a mixture's, is a DINOv3 ViT."""
    tower = model.config.vision_config
    towers = (tower, getattr(tower, "first", None), getattr(tower, "second", None))
    return any(getattr(config, "model_type", None) == "dinov3_vit" for config in towers)


def published_state(model: TinyLlavaForConditionalGeneration, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base weights under their published names, without adapters; a tied head is left out."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    base = {name: tensor for name, tensor in state.items() if ".lora_" not in name and name not in tied}
    published = {published_name(model, name): tensor for name, tensor in base.items()}
    if why_not_plain(model) is None:
        connector = {name: published.pop(name) for name in list(published) if name.startswith(PREFIXES["connector"])}
        published |= as_llava(model, connector, PREFIXES["connector"])
    return published


def as_llava(model: TinyLlavaForConditionalGeneration, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The connector's weights as Llava's projector has them."""
    to_llava = getattr(model.model.multi_modal_projector, "to_llava", dict)
    made = to_llava({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return {prefix + name: tensor.to(model.dtype) for name, tensor in made.items()}
