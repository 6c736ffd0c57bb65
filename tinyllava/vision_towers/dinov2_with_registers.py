"""`dinov2_with_registers`: DINOv2 with register tokens (arXiv 2309.16588). They stand after the CLS token."""

from transformers import PretrainedConfig

from tinyllava.vision_towers.dinov2 import VisionTower as DINOv2


class VisionTower(DINOv2):
    """DINOv2's own processor; more tokens before the patches."""

    @staticmethod
    def prefix_tokens(config: PretrainedConfig) -> int:
        """CLS and the registers."""
        return 1 + config.num_register_tokens
