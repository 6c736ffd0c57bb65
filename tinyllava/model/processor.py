"""One processor for all towers: pictures -> uint8 pixels, and how many tokens a picture takes.

Training hands the model uint8 pixels; the ordinary call normalises, as transformers' users expect.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BaseImageProcessor, BatchFeature, LlavaProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData

from tinyllava.data.sample import IMAGE_TOKEN
from tinyllava.data.tiles import Grid, Tiles, image_tokens, views
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.image_processor import AS_IT_IS, RAW, trusted_class


class TinyLlavaProcessor(LlavaProcessor):
    """Llava's processor with a stated number of tokens a view, for connectors that change it.

    A picture is one view, or with `tiles` its thumbnail and up to so many tiles (data/tiles.py): `pixel_values` then
    holds the views of all pictures, and `image_grids` [pictures, 2] the rows and columns of each.
    """

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
        tiles: int | None = None,
        code: str | None = None,
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
        self.tokens_per_image, self.tiles, self.code = tokens_per_image, tiles, code

    @classmethod
    def _get_arguments_from_pretrained(cls, path: str, processor_dict: dict | None = None, **kwargs: Any) -> list:
        """The image processor and the tokenizer. An image processor that is a user's code must be trusted first."""
        if (processor_dict or {}).get("code"):
            trusted_class(processor_dict["code"])
        return super()._get_arguments_from_pretrained(path, processor_dict, **kwargs)

    @cached_property
    def tiling(self) -> Tiles | None:
        """How pictures are cut, None where they are not. The side is that of whatever the image processor makes."""
        if self.tiles is None:
            return None
        return Tiles(self.tiles, self.image_processor([Image.new("RGB", (64, 64))])["pixel_values"][0].shape[-1])

    def grids(self, sizes: Sequence[tuple[int, int]]) -> list[Grid]:
        """The grids of pictures of these (width, height)."""
        return [self.tiling.grid(size) if self.tiling else (1, 1) for size in sizes]

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes."""
        return super().model_input_names + (["image_grids"] if self.tiles else [])

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        """Pictures as the model takes them, and the placeholders that stand for each."""
        if self.tiles is None:
            return super()._process_images(images, **kwargs)
        images = [
            (image if isinstance(image, Image.Image) else to_pil_image(image)).convert("RGB")
            for image in make_flat_list_of_images(images)
        ]
        grids = self.grids([image.size for image in images])
        made = self._views(images, grids, **{**kwargs, "return_tensors": None})
        inputs = BatchFeature({"pixel_values": made, "image_grids": grids}, tensor_type=kwargs.get("return_tensors"))
        return inputs, [self.replace_image_token(inputs, index) for index in range(len(grids))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: object) -> str:
        """The placeholders of one image."""
        rows, columns = map(int, image_inputs["image_grids"][image_idx]) if self.tiles else (1, 1)
        return self.image_token * image_tokens(self.tokens_per_image, [(rows, columns)])[0]

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: object
    ) -> MultiModalData:
        """Tokens and views of pictures of these (height, width): what servers plan with."""
        if image_sizes is None:
            return MultiModalData()
        grids = self.grids([(width, height) for height, width in image_sizes])
        counts = image_tokens(self.tokens_per_image, grids)
        return MultiModalData(num_image_tokens=counts, num_image_patches=list(map(views, grids)))

    def pixels(self, images: Sequence[Image.Image], grids: Sequence[Grid] | None = None) -> Tensor:
        """Pictures resized, cropped and cut but not normalised: uint8 [views, 3, H, W]. The model normalises on its
        device. `grids` must be given where there are tiles.
        """
        made = self._views(images, grids or [(1, 1)] * len(images), **RAW)
        return torch.from_numpy(np.stack([np.asarray(view) for view in made]).astype(np.uint8))

    def _views(self, images: Sequence[Image.Image], grids: Sequence[Grid], **kwargs: Any) -> list[np.ndarray]:
        """The thumbnail of each picture and its tiles row by row, each [3, H, W]."""
        whole = self.image_processor(list(images), **kwargs)["pixel_values"]
        if all(views(grid) == 1 for grid in grids):
            return list(whole)
        resample = self.image_processor.resample
        cut = [self.tiling.cut(image, grid, resample) for image, grid in zip(images, grids, strict=True)]
        flat = [tile for own in cut for tile in own]
        tiles = iter(self.image_processor(flat, **{**kwargs, **AS_IT_IS})["pixel_values"])
        return [view for first, own in zip(whole, cut, strict=True) for view in [first, *(next(tiles) for _ in own)]]

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
    config: TinyLlavaConfig, images: BaseImageProcessor, tokenizer, chat_template: str, tokens_per_image: int
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
        tiles=config.tiles,
        code=config.image_processor,
    )


AutoProcessor.register(TinyLlavaConfig, TinyLlavaProcessor)
