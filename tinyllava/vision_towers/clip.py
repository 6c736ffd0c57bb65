"""`clip`: CLIP's image encoder (arXiv 2103.00020).

One CLS token. The short side is resized, the centre is cropped, and pixels are normalised with CLIP's statistics.
"""

from transformers import PretrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


class VisionTower:
    """What transformers cannot know about a CLIP tower."""

    @staticmethod
    def prefix_tokens(config: PretrainedConfig) -> int:
        """One: the CLS token."""
        return 1

    @staticmethod
    def image_processor(config: PretrainedConfig) -> dict:
        """Bicubic resize of the short side to the image size, then a centre crop."""
        statistics = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
        return {"size": {"shortest_edge": config.image_size}, "do_center_crop": True, **statistics}
