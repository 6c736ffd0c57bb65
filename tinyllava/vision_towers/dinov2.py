"""`dinov2`: DINOv2 (arXiv 2304.07193). One CLS token; ImageNet statistics."""

from transformers import PretrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from tinyllava.vision_towers.clip import VisionTower as CLIP

STATISTICS = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}


class VisionTower(CLIP):
    """One CLS token, as in CLIP, and another image processor."""

    @staticmethod
    def image_processor(config: PretrainedConfig) -> dict:
        """Resize the short side to 256 / 224 of the crop, then crop the centre, as DINOv2's own processor does.

        DINOv2 was trained at 518 px but is published with a 224 px processor: its position embeddings are interpolated.
        """
        crop = min(224, config.image_size)
        sizes = {"size": {"shortest_edge": crop * 256 // 224}, "crop_size": {"height": crop, "width": crop}}
        return {**sizes, "do_center_crop": True, **STATISTICS}
