"""Group prompts into batches, and find references to the same image.

Padding costs time, and encoding an image twice does too. Therefore questions on the same images stay together in a pool
and in its batches, and batches hold prompts of similar length. This file knows no model.
"""

import hashlib
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from PIL import Image

from tinyllava.data.images import open_image
from tinyllava.data.references import Reference, is_file_reference, resolve_reference

POOL = 1024  # prompts that are sorted together: more need less padding, but the first answer comes later
ROWS, POSITIONS = 128, 8192  # the default batch; Phi-2's keys and values take 2.7 GB for 8192 positions in bf16

ImageKey = tuple[Hashable, ...]
K = TypeVar("K", bound=Hashable)


class Prompt(NamedTuple):
    """A question with everything before it, up to the start of the model's answer."""

    ids: list[int]  # with one `<image>` id for each token of an image
    images: list[tuple[ImageKey, Reference]]

    @property
    def length(self) -> int:
        """The number of positions in the LLM."""
        return len(self.ids)


def make_image_key(image: Reference) -> ImageKey:
    """A key that is equal for references to the same image.

    A file is identified by its name, time and size, a URL by its text, and other images by their content.
    """
    image = resolve_reference(image)
    if isinstance(image, Image.Image):
        shown = open_image(image)  # its mode, palette and EXIF also decide what the model sees
        return ("pixels", shown.size, hashlib.sha256(shown.tobytes()).digest())
    if isinstance(image, bytes):
        return ("bytes", hashlib.sha256(image).digest())
    if not is_file_reference(image):
        return ("url", image)
    try:
        state = os.stat(image)
    except (OSError, ValueError):
        return ("missing", image)  # opening it raises the error
    return ("file", image, state.st_mtime_ns, state.st_size)


def make_pools(keys: Sequence[tuple[ImageKey, ...]], images: int) -> Iterator[list[int]]:
    """Indices of all prompts in pools of up to POOL prompts and at most `images` images. keys: the images of each.

    Prompts on the same images are in one pool, or in neighbouring pools if there are more than POOL. A cache for
    `images` images then encodes each image once.
    """
    groups: dict[tuple[ImageKey, ...], list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    pool: list[int] = []
    in_pool: set[ImageKey] = set()
    for key, members in groups.items():
        for start in range(0, len(members), POOL):
            more = members[start : start + POOL]
            if pool and (len(pool) + len(more) > POOL or len(in_pool | set(key)) > images):
                yield pool
                pool, in_pool = [], set()
            pool = pool + more
            in_pool |= set(key)
    if pool:
        yield pool


def make_batches(
    prompts: Mapping[K, Prompt], limits: Mapping[K, int], size: int | None = None, positions: int = POSITIONS
) -> Iterator[list[K]]:
    """Keys of `prompts` in batches of similar length, the longest first, so that out-of-memory errors come early.

    A batch has `size` rows, by default as many as ROWS and `positions` allow. Its rows have the same limit on new
    tokens, because a long prompt must not shorten the answers of others. Prompts on the same images are split between
    batches only if they do not fit into one.
    """
    groups: dict[Hashable, list[K]] = {}
    for key in sorted(prompts, key=lambda key: -prompts[key].length):
        images = tuple(image for image, _ in prompts[key].images)
        groups.setdefault((images, limits[key]) if images else key, []).append(key)
    batch: list[K] = []

    def is_full(more: int, limit: int) -> bool:
        rows = len(batch) + more
        over = rows > size if size else rows > ROWS or rows * prompts[batch[0]].length > positions
        return over or limit != limits[batch[0]]

    for group in groups.values():
        if batch and is_full(len(group), limits[group[0]]):
            yield batch
            batch = []
        for key in group:
            if batch and is_full(1, limits[key]):
                yield batch
                batch = []
            batch.append(key)
    if batch:
        yield batch
