"""Words to read in an image: names of concepts and invented words, in the Latin letters of DejaVu and Noto fonts.

Every tenth word and two of the fonts are held out of training.
"""

import re
from functools import cache
from itertools import pairwise
from random import Random

from tinyllava.stamps.compose import Box, Scene, Word, choose_background, fit_word
from tinyllava.stamps.library import load_font, load_library

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
def list_words(split: str) -> tuple[str, ...]:
    """Return the words of TRAIN or of HELD_OUT: the names of concepts that are one word of three to eight letters."""
    words = sorted({name for name in load_library().concepts if re.fullmatch("[a-z]{3,8}", name)})
    return tuple(word for i, word in enumerate(words) if (i % 10 == 7) == (split == HELD_OUT))


def invent_word(rng: Random, known: tuple[str, ...]) -> str:
    """Invent a string that is no word: parts of two `known` names, or consonants only.

    A model that was trained on 300 names alone reads a new word as the most similar of them.
    """
    while True:
        if rng.random() < 0.4:
            text = "".join(rng.choices("bcdfghjklmnpqrstvwxyz", k=rng.randint(3, 6)))
        else:
            head, tail = (rng.choice(known) for _ in range(2))
            text = head[: rng.randint(3, 5)] + tail[-rng.randint(3, 5) :]
        if len(text) <= 8 and text not in _list_all_words():
            return text


@cache
def _list_all_words() -> frozenset[str]:
    return frozenset(list_words(TRAIN) + list_words(HELD_OUT))


def invent_wordlike(rng: Random, known: tuple[str, ...]) -> str:
    """Invent a string that is no word but could be one: letters as frequent as in `known`, or the ends of two names.

    It cannot be guessed, so it teaches a model to read letter by letter. It has vowels like a word, so its tokens are
    like those of words.
    """
    while True:
        if rng.random() < 0.5:
            text = "".join(rng.choices("".join(known), k=rng.randint(3, 8)))
        else:
            head, tail = (rng.choice(known) for _ in range(2))
            text = head[: rng.randint(2, 5)] + tail[-rng.randint(1, 5) :]
        if 3 <= len(text) <= 8 and text not in _list_all_words():
            return text


def locate_letters(word: Word) -> tuple[Box, list[float]]:
    """Return the box of the word's letters, and the middle of each letter from the left, in pixels of the image."""
    left, _, right, _ = box = fit_word(word)
    letters = load_font(word.font)
    start, _, end, _ = letters.getbbox(word.text)
    ends = [letters.getlength(word.text[:i]) for i in range(len(word.text) + 1)]
    scale = (right - left) / (end - start)
    return box, [left + ((a + b) / 2 - start) * scale for a, b in pairwise(ends)]


def compose_word_scene(
    rng: Random, size: int, patterns: tuple[str, ...], words: tuple[str, ...], fonts: tuple[str, ...], count: int = 1
) -> Scene:
    """Compose a scene with `count` of the words (one to three), each below the one before.

    The letters are dark on a light background or light on a dark one.
    """
    background = choose_background(rng, patterns)
    dark = sum(background["shades"][0]) > 3 * 110
    columns = []  # left, right of each box
    heights = []
    for _ in range(count):
        width, height = round(size * rng.uniform(0.7, 0.95)), round(size * rng.uniform(0.18, 0.3))
        left = rng.randint(0, size - width)
        columns.append((left, left + width))
        heights.append(height)
    # The gaps above the boxes are sorted, so that boxes never overlap.
    free = size - sum(heights)
    gaps = sorted(rng.randint(0, free) for _ in heights)
    boxes = []
    for number, ((left, right), height) in enumerate(zip(columns, heights, strict=True)):
        top = gaps[number] + sum(heights[:number])
        boxes.append((left, top, right, top + height))
    texts = rng.sample(words, count)
    written = tuple(Word(text, rng.choice(fonts), box, dark) for text, box in zip(texts, boxes, strict=True))
    return Scene(size, words=written, **background)


def ask_to_read(scene: Scene, rng: Random) -> tuple[str, str]:
    """Return a question for all words from top to bottom, and its answer; a third of them ask for each letter."""
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
