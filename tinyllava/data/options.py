"""DataOptions: everything that decides how records become training items."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllava.data.collate import Pixels
from tinyllava.data.template import Template
from tinyllava.data.tiles import Tiles


@dataclass(frozen=True)
class DataOptions:
    """What `build_dataset` needs to know about the model and the stage that it prepares data for."""

    template: Template
    # A fast tokenizer with an `<image>` token (`add_image_token`).
    tokenizer: Any
    # Positions that one view of an image takes in the LLM's input.
    tokens_per_image: int
    # What the model's processor does with images: see `Pixels`.
    pixels: Pixels
    # Positions of the longest sample, with image tokens. A longer sample loses whole rounds from its end.
    max_length: int
    # Which answers are learned: "all" that no flag excludes, or only the "last" turn of each conversation.
    supervised_turns: str = "all"
    # "error" raises UserError with counts and first ids; "skip" drops bad samples and counts them in `bad_records`.
    on_bad_sample: str = "error"
    # Decides which records a fractional weight draws, and the order of a stream.
    seed: int = 0
    # Useful pixels of a view's side: larger JPEGs are decoded smaller. Twice the side of the model's input is safe.
    draft: int | None = None
    # How images are cut into tiles. None: each image is one view.
    tiles: Tiles | None = None
    # Where prepared data is kept. None: $TINYLLAVA_CACHE or ~/.cache/tinyllava.
    cache_dir: str | Path | None = None
