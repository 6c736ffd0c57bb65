"""The layout of a checkpoint: whether it is plain llava, and the names of its weights on disk."""

import copy
import re
from collections.abc import Mapping

from torch import Tensor
from transformers import LlavaConfig

from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.modules import is_adapter

PREFIXES = {"vision_tower": "vision_tower.", "connector": "multi_modal_projector.", "llm": "language_model."}
# In transformers 5 these towers have no `vision_model.` level in memory; published checkpoints and vLLM have it.
NESTED_TOWERS = {"clip_vision_model", "siglip_vision_model"}
# In memory, transformers 5 has DINOv3's layers one level deeper. On disk they must have their published names: from the
# names in memory, loading would add the level twice for `layer_scale1`.
DINOV3_LAYERS = re.compile(r"^(vision_tower\.(?:first\.|second\.)?)model\.layer\.")


def explain_not_plain(model: TinyLlavaForConditionalGeneration) -> str | None:
    """The reason why transformers' own Llava does not compute exactly this model; None if it does."""
    config = model.config
    ((name, _),) = config.connector.items()
    projector = getattr(model.model.multi_modal_projector, "llava_projector", lambda: None)()
    if projector is None:
        return f"the connector {name} is not Llava's two-layer projector"
    for part in (config.text_config, config.vision_config):
        if not type(part).__module__.startswith("transformers."):
            return f"transformers has no {part.model_type}"
    if config.head_bias or config.head_scale != 1.0 or config.head_softcap is not None:
        return "the LLM's output head has a bias, a scale or a soft cap, and Llava's has none"
    if config.tiles:
        return "images are cut into tiles, and Llava sees each image only as a whole"
    if config.image_processor:
        return f"its image processor is your own code, {config.image_processor}"
    if config.image_scale != 1.0:
        return "image tokens are scaled, as by the original's Gemma, and Llava's are not"
    if config.vision_feature_select_strategy == "default" and config.dropped_tokens != 1:
        return f"{config.dropped_tokens} of the tower's leading tokens are dropped, and Llava drops exactly one"
    if config.tie_word_embeddings and model.get_embeddings_name() != "embed_tokens":
        return "Llava ties its head to `embed_tokens`, and this LLM's embeddings have another name"
    if config.image_size != config.vision_config.image_size and config.vision_config.model_type in NESTED_TOWERS:
        return "the images do not have the tower's own size, and Llava does not interpolate positions"
    return None


def make_plain_config(model: TinyLlavaForConditionalGeneration) -> LlavaConfig:
    """The Llava config of a model for which `explain_not_plain` is None."""
    config = model.config
    names = ("image_token_index", "image_seq_length", "vision_feature_select_strategy", "vision_feature_layer")
    plain = LlavaConfig(  # of copies, because it resets the attention implementation of the configs that it gets
        vision_config=copy.deepcopy(config.vision_config),
        text_config=copy.deepcopy(config.text_config),
        tie_word_embeddings=config.tie_word_embeddings,
        **{name: getattr(config, name) for name in names},
        **model.model.multi_modal_projector.llava_projector(),
    )
    plain.architectures, plain.dtype = ["LlavaForConditionalGeneration"], config.dtype
    return plain


def get_published_name(model: TinyLlavaForConditionalGeneration, name: str) -> str:
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
    """Whether the tower, or a member of a mixture, is a DINOv3 ViT."""
    tower = model.config.vision_config
    towers = (tower, getattr(tower, "first", None), getattr(tower, "second", None))
    return any(getattr(config, "model_type", None) == "dinov3_vit" for config in towers)


def to_published_state(model: TinyLlavaForConditionalGeneration, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base weights under their published names, without adapters; a tied head is left out."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    base = {name: tensor for name, tensor in state.items() if not is_adapter(name) and name not in tied}
    published = {get_published_name(model, name): tensor for name, tensor in base.items()}
    if explain_not_plain(model) is None:
        connector = {name: published.pop(name) for name in list(published) if name.startswith(PREFIXES["connector"])}
        published |= to_llava_projector(model, connector, PREFIXES["connector"])
    return published


def to_llava_projector(
    model: TinyLlavaForConditionalGeneration, state: dict[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """The connector's weights under the names of Llava's projector."""
    to_llava = getattr(model.model.multi_modal_projector, "to_llava", dict)
    renamed = to_llava({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    # In the precision of the connector, which can differ from that of the tower and the LLM.
    dtype = next(iter(state.values())).dtype if state else model.dtype
    return {prefix + name: tensor.to(dtype) for name, tensor in renamed.items()}
