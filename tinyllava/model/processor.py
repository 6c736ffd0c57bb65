"""One processor for all towers: it makes pixels of images, and counts the tokens that an image takes.

`to_pixels` returns uint8 for our own training and inference. The ordinary call normalises, as in transformers.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BaseImageProcessor, BatchFeature, LlavaProcessor, PreTrainedTokenizerBase
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData

from tinyllava.data.images import open_image
from tinyllava.data.sample import IMAGE_TOKEN
from tinyllava.data.tiles import Grid, Tiles, count_image_tokens, count_views
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.image_processor import KEEP_SIZE, RAW, load_trusted_class

# How a tokenizer was loaded, which transformers would write into its files. An "auto_map" names code that is not there.
LOADING = {"auto_map", "backend", "from_slow", "is_local", "local_files_only", "name_or_path", "processor_class"}
LOADING |= {"_commit_hash", "special_tokens_map_file", "tokenizer_file", "trust_remote_code", "use_fast"}


class TinyLlavaProcessor(LlavaProcessor):
    """Llava's processor with an explicit number of tokens per view, because some connectors change it.

    An image is one view. With `tiles`, it is a thumbnail and at most so many tiles (data/tiles.py). `pixel_values` then
    holds the views of all images, and `image_grids` [images, 2] the rows and columns of each.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        num_additional_image_tokens: int = 0,
        tokens_per_image: int | None = None,
        tiles: int | None = None,
        code: str | None = None,
    ) -> None:
        parts, patches = (image_processor, tokenizer), (patch_size, vision_feature_select_strategy)
        super().__init__(*parts, *patches, chat_template, image_token, num_additional_image_tokens)
        self.tokens_per_image, self.tiles, self.code = tokens_per_image, tiles, code

    @classmethod
    def _get_arguments_from_pretrained(cls, path: str, processor_dict: dict | None = None, **kwargs: Any) -> list:
        """The image processor and the tokenizer. An image processor that is the user's code must be trusted first."""
        if (processor_dict or {}).get("code"):
            load_trusted_class(processor_dict["code"])
        return super()._get_arguments_from_pretrained(path, processor_dict, **kwargs)

    @cached_property
    def tiling(self) -> Tiles | None:
        """How images are cut into tiles; None if they are not. A tile has the image size of the tower."""
        if self.tiles is None:
            return None
        return Tiles(self.tiles, self.image_processor([Image.new("RGB", (64, 64))])["pixel_values"][0].shape[-1])

    def choose_grids(self, sizes: Sequence[tuple[int, int]]) -> list[Grid]:
        """The grids of images of these (width, height)."""
        return [self.tiling.find_grid(size) if self.tiling else (1, 1) for size in sizes]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return super().model_input_names + (["image_grids"] if self.tiles else [])

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        """The inputs that the model takes for images, and the placeholders of each image."""
        if self.tiles is None:
            return super()._process_images(images, **kwargs)
        images = make_flat_list_of_images(images)
        images = [open_image(each if isinstance(each, Image.Image) else to_pil_image(each)) for each in images]
        grids = self.choose_grids([image.size for image in images])
        tensor_type = kwargs.pop("return_tensors", None)
        pixel_values = self._make_views(images, grids, **kwargs, return_tensors=None)
        inputs = BatchFeature({"pixel_values": pixel_values, "image_grids": grids}, tensor_type=tensor_type)
        return inputs, [self.replace_image_token(inputs, index) for index in range(len(grids))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: object) -> str:
        """The placeholders of one image."""
        rows, columns = map(int, image_inputs["image_grids"][image_idx]) if self.tiles else (1, 1)
        return self.image_token * count_image_tokens(self.tokens_per_image, [(rows, columns)])[0]

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: object
    ) -> MultiModalData:
        """The number of tokens and views of images of these (height, width). vLLM and other servers call it."""
        if image_sizes is None:
            return MultiModalData()
        grids = self.choose_grids([(width, height) for height, width in image_sizes])
        counts = count_image_tokens(self.tokens_per_image, grids)
        return MultiModalData(num_image_tokens=counts, num_image_patches=list(map(count_views, grids)))

    def to_pixels(self, images: Sequence[Image.Image], grids: Sequence[Grid] | None = None) -> Tensor:
        """Images resized, cropped and cut, but not normalised: uint8 [views, 3, H, W].

        The model normalises on its device. `grids` is required where images are cut into tiles.
        """
        pixel_values = self._make_views(images, grids or [(1, 1)] * len(images), **RAW)
        return torch.from_numpy(np.stack([np.asarray(view) for view in pixel_values]).astype(np.uint8))

    def _make_views(self, images: Sequence[Image.Image], grids: Sequence[Grid], **kwargs: Any) -> list[np.ndarray]:
        """The thumbnail of each image and its tiles row by row, each [3, H, W]."""
        whole = self.image_processor(list(images), **kwargs)["pixel_values"]
        if all(count_views(grid) == 1 for grid in grids):
            return list(whole)
        resample = self.image_processor.resample
        cut = [self.tiling.cut(image, grid, resample) for image, grid in zip(images, grids, strict=True)]
        flat = [tile for tiles in cut for tile in tiles]
        processed = iter(self.image_processor(flat, **{**kwargs, **KEEP_SIZE})["pixel_values"])
        images_tiles = zip(whole, cut, strict=True)
        return [view for thumbnail, tiles in images_tiles for view in [thumbnail, *islice(processed, len(tiles))]]

    def to_plain(self) -> LlavaProcessor:
        """This processor as transformers' own class, for checkpoints that are plain llava."""
        names = ("image_processor", "tokenizer", "patch_size", "vision_feature_select_strategy")
        names += ("num_additional_image_tokens", "chat_template")
        return LlavaProcessor(**{name: getattr(self, name) for name in names})


def build_processor(
    config: TinyLlavaConfig,
    images: BaseImageProcessor,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    tokens_per_image: int,
) -> TinyLlavaProcessor:
    """The processor of a model: image processor, tokenizer, chat template and number of image tokens."""
    tokenizer.chat_template = chat_template
    clean_tokenizer(tokenizer)
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


def clean_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer pad on the left, and forget how it was loaded and used, so that its files never depend on that.

    Answers are appended on the right, so a batch of prompts must be padded on the left. Training pads by itself.
    """
    for name in LOADING:
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = "left"
    tokenizer._processor_class = None  # saving a processor sets it
    tokenizer.backend = "tokenizers"  # older files say "pil", and transformers then takes it for a slow tokenizer
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()


AutoProcessor.register(TinyLlavaConfig, TinyLlavaProcessor)
