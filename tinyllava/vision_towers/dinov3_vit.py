"""`dinov3_vit`: DINOv3's ViTs (arXiv 2508.10104). CLS and register tokens; rotary positions, so any image size works.

When the tower is trained, its positions are rescaled at random, as in its pretraining (`pos_embed_rescale` in its
config).
"""

from transformers import PretrainedConfig
from transformers.image_utils import PILImageResampling

from tinyllava.vision_towers.dinov2 import STATISTICS
from tinyllava.vision_towers.dinov2_with_registers import VisionTower as DINOv2WithRegisters


class VisionTower(DINOv2WithRegisters):
    """The leading tokens of DINOv2 with registers, and another image processor."""

    @staticmethod
    def image_processor(config: PretrainedConfig) -> dict:
        """Bilinear resize to a square, the same as DINOv3's own processor, but without torchvision."""
        size = {"height": config.image_size, "width": config.image_size}
        return {"size": size, "do_center_crop": False, "resample": PILImageResampling.BILINEAR, **STATISTICS}
