"""Prompts -> batches: which questions go through a model together, and which pictures are the same one.

Padding costs time, and so does encoding a picture again. So questions on the same pictures stay together in a pool, and
inside a pool they are batched by length. Knows no model.
"""

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tinyllava.data.images import Reference, is_file_reference

POOL = 1024  # prompts sorted by length together: more pad less, and keep the first answer waiting longer
ROWS, POSITIONS = 64, 8192  # the default batch; Phi-2's keys and values take 2.7 GB for 8192 positions in bf16

ImageKey = tuple[Hashable, ...]


class Prompt(NamedTuple):
    """What is asked, up to where the model speaks."""

    ids: list[int]  # with ONE image id a picture
    images: list[tuple[ImageKey, Reference]]
    length: int  # positions, after every image id has become as many as a picture takes


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
    if not Path(image).is_file():
        return ("missing", image)  # opening it says so
    state = Path(image).stat()
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


def batches(prompts: Mapping[int, Prompt], limits: Mapping[int, int], size: int | None = None) -> Iterator[list[int]]:
    """Keys of `prompts` in batches of similar length, the longest first (so that too little memory shows at once).

    A batch has `size` rows, by default as many as ROWS and POSITIONS allow, and one limit on new tokens: a prompt that
    has less room than others must not shorten their answers.
    """
    batch: list[int] = []
    for index in sorted(prompts, key=lambda index: -prompts[index].length):
        if batch:
            longest = prompts[batch[0]].length
            full = len(batch) == size if size else len(batch) == ROWS or (len(batch) + 1) * longest > POSITIONS
            if full or limits[index] != limits[batch[0]]:
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch
