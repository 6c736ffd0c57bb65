"""Collator: items of a dataset -> one padded batch. It only copies: the dataset has decoded and tokenised already.

B: samples, L: the longest sample's positions, N: views of all images of the batch, in order of their samples. An
image that is not cut into tiles is one view.
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from tinyllava.data.labels import IGNORE
from tinyllava.data.tiles import Grid

# What a model's processor does: images, and the grids of those cut into tiles -> uint8 [views, 3, H, W]
Pixels = Callable[..., torch.Tensor]


def make_image_inputs(pixels: Pixels, images: list[Image.Image], grids: list[Grid] | None) -> dict[str, Any]:
    """The image entries of an item, as the Collator takes them. grids: only where images are cut into tiles."""
    if not images:
        return {"pixel_values": None}
    if grids is None:
        return {"pixel_values": pixels(images)}
    return {"pixel_values": pixels(images, grids), "image_grids": torch.tensor(grids)}


class Collator:
    """Pads on the right: `pad_token_id` for ids, IGNORE for labels.

    The attention mask comes from lengths: many tokenizers pad with the end-of-text token, which the model also learns.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """{"input_ids", "attention_mask", "labels": [B, L], "pixel_values": uint8 [N, 3, H, W], "index": [B]}, int64

        "pixel_values" is missing if no sample has an image. With tiles, "image_grids" [images, 2] is added. "skipped"
        (bool [B]) is added if an image of a sample could not be read.
        """
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        batch = {
            "input_ids": pad_sequence([item["input_ids"] for item in items], True, self.pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": pad_sequence([item["labels"] for item in items], True, IGNORE),
            "index": torch.tensor([item["index"] for item in items]),
        }
        if pixels := [item["pixel_values"] for item in items if item["pixel_values"] is not None]:
            batch["pixel_values"] = torch.cat(pixels)
        if grids := [item["image_grids"] for item in items if "image_grids" in item]:
            batch["image_grids"] = torch.cat(grids)
        skipped = [bool(item.get("skipped")) for item in items]
        if any(skipped):
            batch["skipped"] = torch.tensor(skipped)
        return batch
