"""Vision towers turn pictures into patch features: one file each, named by `config.model_type` (without
`_vision_model`).

    class VisionTower:                      # knowledge about a family of transformers vision models, no state
        prefix_tokens(config) -> int        # CLS and register tokens that stand before the patches
        image_processor(config) -> dict     # fields of LlavaImageProcessor that equal the family's own processor

A tower loads through `AutoModel`; its file only says what transformers cannot tell.

A mixture of towers (mof.py) is a model with `members(pixel_values, indices)`: each tower with its own pixels, the
indices of its hidden states and the number of its prefix tokens.
"""

from torch import Tensor
from transformers import PretrainedConfig


def size_options(config: PretrainedConfig, pixel_values: Tensor) -> dict:
    """What a tower must be told about pictures of another size than its own: CLIP and SigLIP interpolate their position
    embeddings only on demand, DINOv2 does so by itself.
    """
    switched = config.model_type in {"clip_vision_model", "siglip_vision_model"}
    return {"interpolate_pos_encoding": True} if switched and pixel_values.shape[-1] != config.image_size else {}
