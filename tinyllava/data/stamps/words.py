"""Written words for reading: only names of concepts, in small Latin subsets of the DejaVu and Noto fonts.

Every tenth word and two of the fonts stay out of training.
"""

import re
from random import Random

from tinyllava.data.stamps.compose import Scene, Word, background
from tinyllava.data.stamps.library import library

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


def scene(rng: Random, size: int, patterns: tuple[str, ...], words: tuple[str, ...], fonts: tuple[str, ...]) -> Scene:
    """A picture with one word, dark on a light background or light on a dark one."""
    ground = background(rng, patterns)
    width, height = round(size * rng.uniform(0.7, 0.95)), round(size * rng.uniform(0.18, 0.3))
    x, y = rng.randint(0, size - width), rng.randint(0, size - height)
    dark = sum(ground["shades"][0]) > 3 * 110
    word = Word(rng.choice(words), rng.choice(fonts), (x, y, x + width, y + height), dark)
    return Scene(size, words=(word,), **ground)
