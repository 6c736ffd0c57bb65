"""Encode images as image tokens, each distinct image once, and embed slices of prompts for the LLM.

Shapes: B rows, L positions, T tokens of an image, D width of the LLM.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinyllava.data.images import Reference, open_image, read_image_size
from tinyllava.data.tiles import count_image_tokens
from tinyllava.infer.prompts import ImageKey, Prompt
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processor import TinyLlavaProcessor

IMAGE_CACHE = 512 * 2**20  # bytes of cached image tokens; SigLIP's 729 at Phi-2's width take 3.7 MB in bf16
TOWER_ROWS = 32  # views in one run of the tower; an image without tiles is one view


class PromptSlice(NamedTuple):
    """Positions `start` to `stop` of a prompt."""

    prompt: Prompt
    start: int
    stop: int


class ImageEncoder:
    """Encodes images with a model's tower and connector, and caches their tokens. The cache has a fixed size."""

    def __init__(self, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor) -> None:
        self.model, self.processor = model, processor
        self.cache: OrderedDict[ImageKey, Tensor] = OrderedDict()  # [T, D] each, the least recently used first

    @property
    def capacity(self) -> int:
        """How many images fit into the cache, if each has the largest number of tokens."""
        # Tiles in one column have the most rows, and so the most separators.
        (most,) = count_image_tokens(self.processor.tokens_per_image, [(self.processor.tiles or 1, 1)])
        numbers = most * self.model.config.text_config.hidden_size
        return max(1, IMAGE_CACHE // (numbers * self.model.dtype.itemsize))

    def count_tokens(self, image: Reference) -> int:
        """How many tokens an image takes."""
        if self.processor.tiles is None:
            return self.processor.tokens_per_image
        grids = self.processor.choose_grids([read_image_size(image)])
        return count_image_tokens(self.processor.tokens_per_image, grids)[0]

    def encode(self, images: Sequence[tuple[ImageKey, Reference]]) -> list[Tensor]:
        """Tokens [T, D] of each image: from the cache, or through tower and connector."""
        references = dict(images)
        tokens = {key: self.cache[key] for key in references if key in self.cache}
        missing = [key for key in references if key not in tokens]
        rows = TOWER_ROWS // (1 + (self.processor.tiles or 0)) or 1
        for start in range(0, len(missing), rows):
            keys = missing[start : start + rows]
            encoded = self._run_tower([open_image(references[key]) for key in keys])
            # Clones: a view into the batch would keep the tokens of all its images in memory.
            tokens |= {key: image.clone() for key, image in zip(keys, encoded, strict=True)}
        for key, image in tokens.items():
            self.cache[key] = image
            self.cache.move_to_end(key)
        while len(self.cache) > self.capacity:
            self.cache.popitem(last=False)
        return [tokens[key] for key, _ in images]

    def _run_tower(self, images: list[Image.Image]) -> tuple[Tensor, ...]:
        run, device = self.model.model.get_image_features, self.model.device
        if self.processor.tiles is None:
            return run(self.processor.to_pixels(images).to(device)).pooler_output
        grids = self.processor.choose_grids([image.size for image in images])
        return run(self.processor.to_pixels(images, grids).to(device), torch.tensor(grids)).pooler_output

    def forget_urls(self) -> None:
        """Drop images from URLs: a URL may show another image in the next call."""
        for key in [key for key in self.cache if key[0] == "url"]:
            del self.cache[key]

    def embed(self, slices: Sequence[PromptSlice], pad_id: int, side: str = "left") -> tuple[Tensor, Tensor]:
        """Ids [B, L] of the slices, padded on `side`, and their embeddings [B, L, D] with the tokens of the images."""
        image_id = self.model.config.image_token_id
        rows = [torch.tensor(prompt.ids[start:stop]) for prompt, start, stop in slices]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side).to(self.model.device)
        embeds = self.model.get_input_embeddings()(ids)
        with_images = [slice_ for slice_, row in zip(slices, rows, strict=True) if (row == image_id).any()]
        if with_images:
            encoded = iter(self.encode([image for slice_ in with_images for image in slice_.prompt.images]))
            inserted = []
            for prompt, start, stop in with_images:
                tokens = torch.cat([next(encoded) for _ in prompt.images])
                # A slice may begin inside an image: skip the tokens that lie before it.
                first = prompt.ids[:start].count(image_id)
                inserted.append(tokens[first : first + prompt.ids[start:stop].count(image_id)])
            embeds = embeds.masked_scatter((ids == image_id)[..., None], torch.cat(inserted).to(embeds))
        return ids, embeds
