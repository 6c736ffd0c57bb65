"""`dinov2_with_registers`: DINOv2 with register tokens (arXiv 2309.16588), which follow the CLS token."""

from transformers import PretrainedConfig

from tinyllava.vision_towers.dinov2 import VisionTower as DINOv2


class VisionTower(DINOv2):
    """The image processor of DINOv2, and more tokens before the patches."""

    @staticmethod
    def prefix_tokens(config: PretrainedConfig) -> int:
        """The number of registers, and one for the CLS token."""
        return 1 + config.num_register_tokens
