"""One processor for all towers: pictures -> uint8 pixels, and how many tokens a picture takes.

`LlavaImageProcessor` (PIL backend) equals CLIP's, SigLIP's and DINOv2's own processors once its fields are set, so
that every checkpoint carries the same one. Training hands the model uint8 pixels; the ordinary call normalises, as
transformers' users expect.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tinyllava.data.sample import IMAGE_TOKEN
from tinyllava.model.modeling import TinyLlavaConfig


def image_processor(fields: dict, image_size: int, aspect: str = "processor") -> LlavaImageProcessorPil:
    """Llava's image processor with a tower's `fields`, giving squares of `image_size` pixels.

    aspect: `processor` as the tower's own; `square` squashes, `pad` pads to a square first, `crop` cuts the centre.
    """
    square = {"height": image_size, "width": image_size}
    shapes = {
        "processor": {},
        "square": {"size": square, "do_center_crop": False, "do_pad": False},
        "pad": {"size": square, "do_center_crop": False, "do_pad": True},
        "crop": {"size": {"shortest_edge": image_size}, "do_center_crop": True, "do_pad": False},
    }
    # crop_size is always set: LlavaProcessor and vLLM count an image's tokens from it even where nothing is cropped.
    return LlavaImageProcessorPil(**{**fields, **shapes[aspect], "crop_size": square})


class TinyLlavaProcessor(LlavaProcessor):
    """Llava's processor with a stated number of tokens an image, for connectors that change it."""

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        num_additional_image_tokens: int = 0,
        tokens_per_image: int | None = None,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            patch_size,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            num_additional_image_tokens,
        )
        self.tokens_per_image = tokens_per_image

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: object) -> str:
        """The placeholders of one image."""
        return self.image_token * self.tokens_per_image

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: object):
        data = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        if image_sizes is not None:
            data["num_image_tokens"] = [self.tokens_per_image] * len(image_sizes)
        return data

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures resized and cropped but not normalised: uint8 [I, 3, H, W]. The model normalises on its device."""
        made = self.image_processor(list(images), do_rescale=False, do_normalize=False)["pixel_values"]
        return torch.from_numpy(np.stack([np.asarray(image) for image in made]).astype(np.uint8))

    def plain(self) -> LlavaProcessor:
        """The same as transformers' own class, for checkpoints that are plain llava."""
        return LlavaProcessor(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            patch_size=self.patch_size,
            vision_feature_select_strategy=self.vision_feature_select_strategy,
            num_additional_image_tokens=self.num_additional_image_tokens,
            chat_template=self.chat_template,
        )


def build_processor(
    config: TinyLlavaConfig, images: LlavaImageProcessorPil, tokenizer, chat_template: str, tokens_per_image: int
) -> TinyLlavaProcessor:
    """The processor of a model: its pictures, its tokenizer, its chat template and its image tokens."""
    tokenizer.chat_template = chat_template
    return TinyLlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=config.prefix_tokens,
        chat_template=chat_template,
        tokens_per_image=tokens_per_image,
    )


AutoProcessor.register(TinyLlavaConfig, TinyLlavaProcessor)
