"""Pictures -> image tokens, each distinct picture once; and pieces of prompts -> what the LLM reads.

Shapes: B rows, L positions, T tokens of a picture, D width of the LLM.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinyllava.data.images import Reference, image_size, open_image
from tinyllava.data.prompts import ImageKey, Prompt
from tinyllava.data.tiles import image_tokens
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processor import TinyLlavaProcessor

IMAGE_CACHE = 512 * 2**20  # bytes of image tokens kept; SigLIP's 729 in Phi-2's width take 3.7 MB a picture in bf16
TOWER_ROWS = 32  # views in one run of the tower; a picture without tiles is one


class Piece(NamedTuple):
    """Positions `start` to `stop` of a prompt."""

    prompt: Prompt
    start: int
    stop: int


class Pictures:
    """The image tokens of a model, in a cache whose size does not depend on how many pictures there are."""

    def __init__(self, model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor) -> None:
        self.model, self.processor = model, processor
        self.kept: OrderedDict[ImageKey, Tensor] = OrderedDict()  # [T, D] each, the least recently used first

    def size(self) -> int:
        """How many pictures are kept: of those that take the most tokens."""
        (most,) = image_tokens(self.processor.tokens_per_image, [(self.processor.tiles or 1, 1)])
        numbers = most * self.model.config.text_config.hidden_size
        return max(1, IMAGE_CACHE // (numbers * self.model.dtype.itemsize))

    def count(self, image: Reference) -> int:
        """How many tokens a picture takes."""
        if self.processor.tiles is None:
            return self.processor.tokens_per_image
        return image_tokens(self.processor.tokens_per_image, self.processor.grids([image_size(image)]))[0]

    def tokens(self, images: Sequence[tuple[ImageKey, Reference]]) -> list[Tensor]:
        """Tokens [T, D] of each picture: from the cache, or through tower and connector, every distinct one once."""
        references = dict(images)
        made = {key: self.kept[key] for key in references if key in self.kept}
        missing = [key for key in references if key not in made]
        rows = TOWER_ROWS // (1 + (self.processor.tiles or 0)) or 1
        for start in range(0, len(missing), rows):
            keys = missing[start : start + rows]
            tokens = self._encoded([open_image(references[key]) for key in keys])
            made |= {key: own.clone() for key, own in zip(keys, tokens, strict=True)}  # a view keeps all others alive
        for key, tokens in made.items():
            self.kept[key] = tokens
            self.kept.move_to_end(key)
        while len(self.kept) > self.size():
            self.kept.popitem(last=False)
        return [made[key] for key, _ in images]

    def _encoded(self, images: list[Image.Image]) -> tuple[Tensor, ...]:
        encode, device = self.model.model.get_image_features, self.model.device
        if self.processor.tiles is None:
            return encode(self.processor.pixels(images).to(device)).pooler_output
        grids = self.processor.grids([image.size for image in images])
        return encode(self.processor.pixels(images, grids).to(device), torch.tensor(grids)).pooler_output

    def forget_urls(self) -> None:
        """A URL may show something else in the next call."""
        for key in [key for key in self.kept if key[0] == "url"]:
            del self.kept[key]

    def embed(self, pieces: Sequence[Piece], pad_id: int, side: str = "left") -> tuple[Tensor, Tensor]:
        """Ids [B, L] of the pieces, padded on a side, and their embeddings [B, L, D] with the pictures' tokens in."""
        image_id = self.model.config.image_token_id
        rows = [torch.tensor(prompt.ids[start:stop]) for prompt, start, stop in pieces]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side).to(self.model.device)
        embeds = self.model.get_input_embeddings()(ids)
        shown = [piece for piece, row in zip(pieces, rows, strict=True) if (row == image_id).any()]
        if shown:
            tokens = iter(self.tokens([image for piece in shown for image in piece.prompt.images]))
            parts = []
            for prompt, start, stop in shown:
                own = torch.cat([next(tokens) for _ in prompt.images])
                first = prompt.ids[:start].count(image_id)
                parts.append(own[first : first + prompt.ids[start:stop].count(image_id)])
            embeds = embeds.masked_scatter((ids == image_id)[..., None], torch.cat(parts).to(embeds))
        return ids, embeds
