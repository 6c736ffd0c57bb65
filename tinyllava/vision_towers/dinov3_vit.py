"""`dinov3_vit`: DINOv3's ViTs (arXiv 2508.10104). CLS and register tokens; rotary positions, so any image size works.

When the tower is trained, its positions are rescaled at random, as in its pretraining (`pos_embed_rescale` in its
config).
"""

from transformers import PretrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


class VisionTower:
    """What transformers cannot know about a DINOv3 tower."""

    @staticmethod
    def prefix_tokens(config: PretrainedConfig) -> int:
        """The number of registers, and one for the CLS token."""
        return 1 + config.num_register_tokens

    @staticmethod
    def image_processor(config: PretrainedConfig) -> dict:
        """Bilinear resize to a square, the same as DINOv3's own processor, but without torchvision."""
        return {
            "size": {"height": config.image_size, "width": config.image_size},
            "do_center_crop": False,
            "resample": PILImageResampling.BILINEAR,
            "image_mean": IMAGENET_DEFAULT_MEAN,
            "image_std": IMAGENET_DEFAULT_STD,
        }
