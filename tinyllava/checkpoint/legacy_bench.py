"""Convert checkpoints of TinyLLaVABench, which have LLaVA's layout, to those of the original TinyLLaVA Factory."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tinyllava.checkpoint.legacy_weights import CONNECTOR, TOWER
from tinyllava.errors import UserError

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


def convert_bench(
    written: Mapping[str, Any], state: Mapping[str, Tensor], vision_config: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert TinyLLaVABench's config and weights to those of the original Factory.

    Its SigLIP was saved without the last layer and the head. The model uses all patches of the last layer that is left.
    """
    if written.get("mm_projector_type") == "resampler":
        raise UserError(
            "this checkpoint has TinyLLaVABench's own resampler, which is not supported. Use another checkpoint."
        )
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
            "this checkpoint contains no vision tower, and none is downloaded for it. Use a complete checkpoint."
        )
    if f"{TOWER}vision_model.embeddings.class_embedding" in renamed:
        if vision_config is None:
            raise UserError(
                "the config of this checkpoint's CLIP is missing. Give the vision_config in the config.json of"
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
