"""Written words for reading: only names of concepts, in small Latin subsets of the DejaVu and Noto fonts.

Every tenth word and two of the fonts stay out of training.
"""

import re
from functools import cache
from itertools import pairwise
from random import Random

from tinyllava.data.stamps.compose import Box, Scene, Word, background, ink
from tinyllava.data.stamps.library import font, library

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSerif",
    "NotoSerifDisplay-Bold",
    "NotoSerif-Regular",
    "NotoSans-Bold",
)
HELD_OUT_FONTS = ("DejaVuSerif-Bold", "NotoSans-Regular")
TRAIN, HELD_OUT = "train", "held_out"


def split(part: str) -> tuple[str, ...]:
    """The words of one part: single words of three to eight letters."""
    words = sorted({name for name in library().concepts if re.fullmatch("[a-z]{3,8}", name)})
    return tuple(word for i, word in enumerate(words) if (i % 10 == 7) == (part == HELD_OUT))


def invented(rng: Random, known: tuple[str, ...]) -> str:
    """A string that is no word: halves of two names, or letters without vowels, which spell nothing.

    Whoever has only ever read 300 names reads the nearest of them into a new word.
    """
    while True:
        if rng.random() < 0.4:
            text = "".join(rng.choices("bcdfghjklmnpqrstvwxyz", k=rng.randint(3, 6)))
        else:
            head, tail = (rng.choice(known) for _ in range(2))
            text = head[: rng.randint(3, 5)] + tail[-rng.randint(3, 5) :]
        if len(text) <= 8 and text not in _names():
            return text


@cache
def _names() -> frozenset[str]:
    return frozenset(split(TRAIN) + split(HELD_OUT))


def placed(word: Word) -> tuple[Box, list[float]]:
    """Where the word stands in the picture, and the middle of each of its letters from the left, in pixels."""
    left, _, right, _ = box = ink(word)
    letters = font(word.font)
    start, _, end, _ = letters.getbbox(word.text)
    ends = [letters.getlength(word.text[:i]) for i in range(len(word.text) + 1)]
    scale = (right - left) / (end - start)
    return box, [left + ((a + b) / 2 - start) * scale for a, b in pairwise(ends)]


def scene(rng: Random, size: int, patterns: tuple[str, ...], words: tuple[str, ...], fonts: tuple[str, ...]) -> Scene:
    """A picture with one word, dark on a light background or light on a dark one."""
    ground = background(rng, patterns)
    width, height = round(size * rng.uniform(0.7, 0.95)), round(size * rng.uniform(0.18, 0.3))
    x, y = rng.randint(0, size - width), rng.randint(0, size - height)
    dark = sum(ground["shades"][0]) > 3 * 110
    word = Word(rng.choice(words), rng.choice(fonts), (x, y, x + width, y + height), dark)
    return Scene(size, words=(word,), **ground)
