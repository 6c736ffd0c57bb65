"""Prompts -> batches: which questions go through a model together, and which pictures are the same one.

Padding costs time, and so does computing a picture again. So questions on the same pictures stay together, in a pool
and in its batches, and batches are made by length. Knows no model.
"""

import hashlib
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from PIL import Image

from tinyllava.data.images import Reference, is_file_reference

POOL = 1024  # prompts sorted by length together: more pad less, and keep the first answer waiting longer
ROWS, POSITIONS = 128, 8192  # the default batch; Phi-2's keys and values take 2.7 GB for 8192 positions in bf16

ImageKey = tuple[Hashable, ...]
K = TypeVar("K", bound=Hashable)


class Prompt(NamedTuple):
    """What is asked, up to where the model speaks."""

    ids: list[int]  # with as many image ids for a picture as it has tokens
    images: list[tuple[ImageKey, Reference]]

    @property
    def length(self) -> int:
        """Positions in the LLM."""
        return len(self.ids)


def image_key(image: Reference) -> ImageKey:
    """Equal for references that show the same picture: a file by its name, time and size, all else by its content."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image.get("url") or b""
    if isinstance(image, Image.Image):
        return ("pixels", image.mode, image.size, hashlib.sha256(image.tobytes()).digest())
    if isinstance(image, bytes):
        return ("bytes", hashlib.sha256(image).digest())
    if not is_file_reference(image):
        return ("url", image)
    try:
        state = os.stat(image)
    except (OSError, ValueError):
        return ("missing", image)  # opening it says so
    return ("file", image, state.st_mtime_ns, state.st_size)


def pools(keys: Sequence[tuple[ImageKey, ...]], images: int) -> Iterator[list[int]]:
    """Indices of all prompts in pools of up to POOL, given the pictures of each; a pool has at most `images` pictures.

    Prompts on the same pictures share a pool (or neighbouring ones, where there are more than POOL of them), so that
    a cache of `images` pictures never encodes one twice.
    """
    groups: dict[tuple[ImageKey, ...], list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    pool: list[int] = []
    shown: set[ImageKey] = set()
    for key, members in groups.items():
        for start in range(0, len(members), POOL):
            more = members[start : start + POOL]
            if pool and (len(pool) + len(more) > POOL or len(shown | set(key)) > images):
                yield pool
                pool, shown = [], set()
            pool = pool + more
            shown |= set(key)
    if pool:
        yield pool


def batches(
    prompts: Mapping[K, Prompt], limits: Mapping[K, int], size: int | None = None, positions: int = POSITIONS
) -> Iterator[list[K]]:
    """Keys of `prompts` in batches of similar length, the longest first (so that too little memory shows at once).

    A batch has `size` rows, by default as many as ROWS and `positions` allow, and one limit on new tokens: a prompt
    that has less room than others must not shorten their answers. Prompts on the same pictures are parted only where
    they fill a batch.
    """
    groups: dict[Hashable, list[K]] = {}
    for key in sorted(prompts, key=lambda key: -prompts[key].length):
        shown = tuple(image for image, _ in prompts[key].images)
        groups.setdefault((shown, limits[key]) if shown else key, []).append(key)
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
