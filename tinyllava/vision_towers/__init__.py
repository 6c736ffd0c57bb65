"""Vision towers turn pictures into patch features: one file each, named by `config.model_type` (without
`_vision_model`).

    class VisionTower:                      # knowledge about a family of transformers vision models, no state
        prefix_tokens(config) -> int        # CLS and register tokens that stand before the patches
        image_processor(config) -> dict     # fields of LlavaImageProcessor that equal the family's own processor

A tower loads through `AutoModel`; its file only says what transformers cannot tell. A recipe may name one that stands
outside the package, as `family: my_pkg.my_module:VisionTower` (docs/add-your-own-vision-tower.md).

A mixture of towers (mof.py) is a model with `members(pixel_values, indices)`: each tower with its own pixels, the
indices of its hidden states and the number of its prefix tokens.
"""

from torch import Tensor
from transformers import PretrainedConfig

from tinyllava.errors import UserError


def family_name(config: PretrainedConfig) -> str:
    """The name of the file that knows a tower: `siglip` of `siglip_vision_model`, `dinov3_vit` of itself.

    Raises UserError for NaFlex SigLIP2, whose pictures keep their shape and so have no fixed grid of patches.
    """
    name = config.model_type.removesuffix("_vision_model").removesuffix("_vision")
    if name == "siglip2":
        raise UserError(
            "vision tower siglip2: NaFlex SigLIP2 gives no fixed number of patches. Use a fixed-resolution one, such as"
            " google/siglip2-base-patch16-256 or google/siglip2-so400m-patch14-384."
        )
    return name


def size_options(config: PretrainedConfig, pixel_values: Tensor) -> dict:
    """What a tower must be told about pictures of another size than its own: CLIP and SigLIP interpolate their position
    embeddings only on demand, DINOv2 does so by itself.
    """
    switched = config.model_type in {"clip_vision_model", "siglip_vision_model"}
    return {"interpolate_pos_encoding": True} if switched and pixel_values.shape[-1] != config.image_size else {}
