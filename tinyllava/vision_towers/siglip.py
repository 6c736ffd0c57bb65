"""`siglip`: SigLIP and fixed-resolution SigLIP2 (arXiv 2303.15343, 2502.14786).

No CLS token: every token is a patch.
"""

from transformers import PretrainedConfig


class VisionTower:
    """What transformers cannot know about a SigLIP tower."""

    @staticmethod
    def prefix_tokens(config: PretrainedConfig) -> int:
        """Zero: all 729 tokens of so400m-patch14-384 are patches."""
        return 0

    @staticmethod
    def image_processor(config: PretrainedConfig) -> dict:
        """Bicubic resize to a square, which changes the aspect ratio; values in [-1, 1]."""
        size = {"height": config.image_size, "width": config.image_size}
        return {"size": size, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
