"""Written words for reading: names of concepts and inventions, in small Latin subsets of the DejaVu and Noto fonts.

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


@cache
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


def wordlike(rng: Random, known: tuple[str, ...]) -> str:
    """A string that is no word and could be one: letters as often as names have them, or two ends of names.

    Nothing of it can be guessed, so it teaches to read letter by letter; it has the vowels of a word, so that the
    language model puts together what words are made of.
    """
    while True:
        if rng.random() < 0.5:
            text = "".join(rng.choices("".join(known), k=rng.randint(3, 8)))
        else:
            head, tail = (rng.choice(known) for _ in range(2))
            text = head[: rng.randint(2, 5)] + tail[-rng.randint(1, 5) :]
        if 3 <= len(text) <= 8 and text not in _names():
            return text


def placed(word: Word) -> tuple[Box, list[float]]:
    """Where the word stands in the picture, and the middle of each of its letters from the left, in pixels."""
    left, _, right, _ = box = ink(word)
    letters = font(word.font)
    start, _, end, _ = letters.getbbox(word.text)
    ends = [letters.getlength(word.text[:i]) for i in range(len(word.text) + 1)]
    scale = (right - left) / (end - start)
    return box, [left + ((a + b) / 2 - start) * scale for a, b in pairwise(ends)]


def scene(
    rng: Random, size: int, patterns: tuple[str, ...], words: tuple[str, ...], fonts: tuple[str, ...], count: int = 1
) -> Scene:
    """A picture with a word, or up to three below each other, dark on a light background or light on a dark one."""
    ground = background(rng, patterns)
    dark = sum(ground["shades"][0]) > 3 * 110
    boxes = []
    for _ in range(count):
        width, height = round(size * rng.uniform(0.7, 0.95)), round(size * rng.uniform(0.18, 0.3))
        boxes.append((rng.randint(0, size - width), width, height))
    free, above, placed = size - sum(height for _, _, height in boxes), 0, []
    for gap, (x, width, height) in zip(sorted(rng.randint(0, free) for _ in boxes), boxes, strict=True):
        placed.append((x, gap + above, x + width, gap + above + height))
        above += height
    texts = rng.sample(words, count)
    return Scene(
        size,
        words=tuple(Word(text, rng.choice(fonts), box, dark) for text, box in zip(texts, placed, strict=True)),
        **ground,
    )


def read(scene: Scene, rng: Random) -> tuple[str, str]:
    """Everything that is written, from top to bottom, letter by letter in a third of the questions."""
    texts = [word.text for word in scene.words]
    several = len(texts) > 1
    words = "words" if several else "word"
    if rng.random() < 1 / 3:
        return f"<image>\nSpell the {words}.", ", ".join(" ".join(text) for text in texts)
    forms = [
        "What does the picture say?",
        f"Which {words} {'are' if several else 'is'} written here?",
        f"Read the {words}.",
    ]
    return f"<image>\n{rng.choice(forms)}", ", ".join(texts)
