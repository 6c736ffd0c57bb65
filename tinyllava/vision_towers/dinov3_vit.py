"""`dinov3_vit`: DINOv3's ViTs (arXiv 2508.10104). CLS and register tokens; rotary positions, so any size of picture.

While it is trained, its positions are stretched at random as in its pretraining (`pos_embed_rescale` of its config).
"""

from transformers import PretrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


class VisionTower:
    """What loading a DINOv3 tower needs to know."""

    @staticmethod
    def prefix_tokens(config: PretrainedConfig) -> int:
        """CLS and the registers."""
        return 1 + config.num_register_tokens

    @staticmethod
    def image_processor(config: PretrainedConfig) -> dict:
        """Bilinear resize to a square, as DINOv3's own processor does (which exists for torchvision only)."""
        return {
            "size": {"height": config.image_size, "width": config.image_size},
            "do_center_crop": False,
            "resample": PILImageResampling.BILINEAR,
            "image_mean": IMAGENET_DEFAULT_MEAN,
            "image_std": IMAGENET_DEFAULT_STD,
        }
