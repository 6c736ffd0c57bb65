"""`siglip`: SigLIP and fixed-resolution SigLIP2 (arXiv 2303.15343, 2502.14786).

No CLS token: every token is a patch.
"""

from transformers import PretrainedConfig


class VisionTower:
    """What loading a SigLIP tower needs to know."""

    @staticmethod
    def prefix_tokens(config: PretrainedConfig) -> int:
        """None: all 729 tokens of so400m-384 are patches."""
        return 0

    @staticmethod
    def image_processor(config: PretrainedConfig) -> dict:
        """Bicubic resize to a square (the aspect ratio is not kept), values in [-1, 1]."""
        return {
            "size": {"height": config.image_size, "width": config.image_size},
            "do_center_crop": False,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
