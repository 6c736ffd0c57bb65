"""What each patch of a picture shows, in words: what the tower of the package is pretrained on (train/tower.py), and
what its LLM reads where pictures will be (`raster`).

A caption says all of a picture in one line, and a tower must find out which word is where. Here every patch of a G x G
grid is told its own words: what is there (or nothing), what kind of thing that is, its colour, which part of the thing
the patch shows, where in the picture the thing is, how many there are of it and of all, the letters written in the
patch, and the colour of the background.
"""

from collections.abc import Iterable
from itertools import cycle, islice

import numpy as np

from tinyllava.data.stamps import words
from tinyllava.data.stamps.compose import BACKGROUNDS, QUADRANTS, Scene, Word
from tinyllava.data.stamps.library import TINTS, library

GRID = 6  # patches a side of the nano tower
UNKNOWN = -100  # this patch is not told a word of that sort: it would not be certain
COVERED = 0.4  # share of a patch that a thing must take to be what is there; under BARE there is nothing
BARE = 0.12
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LETTER_SORTS = ("letter on the left", "letter on the right")
COUNTS = ("one", "two", "three", "four", "five", "six")
COLUMNS, ROWS = (tuple(f"{side} {n}" for n in range(1, GRID + 1)) for side in ("column", "row"))
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "middle", "right"))


def vocabulary(concepts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The sorts of words that a patch is told, and the words of each. The first name and letter are 'nothing'."""
    concepts = tuple(concepts)
    kinds = tuple(sorted({kind for name in concepts if (kind := library().concepts[name].kind)}))
    return {
        "name": ("nothing", *concepts),
        "kind": kinds,
        "colour": tuple(TINTS),
        "part": PLACES,
        "corner": QUADRANTS,
        "column": COLUMNS,  # of the middle of the thing
        "row": ROWS,
        "count": COUNTS,  # of things of this name
        "things": COUNTS,
        "background": tuple(BACKGROUNDS),
        **dict.fromkeys(LETTER_SORTS, ("nothing", *LETTERS)),
    }


def described(scene: Scene, grid: int, vocabulary: dict[str, tuple[str, ...]]) -> np.ndarray:
    """int64 [sorts, grid * grid]: the index of each patch's word of each sort, patches in raster order, or UNKNOWN."""
    found = {sort: np.full((grid, grid), UNKNOWN) for sort in vocabulary}
    found["background"][:] = vocabulary["background"].index(scene.background)
    if scene.things:
        found["things"][:] = len(scene.things) - 1
    owners, bare = covered(scene, grid)
    middles = (np.arange(grid) + 0.5) * scene.size / grid
    for number, thing in enumerate(scene.things):
        on = owners == number
        found["name"][on] = vocabulary["name"].index(thing.concept.name)
        if thing.concept.kind:
            found["kind"][on] = vocabulary["kind"].index(thing.concept.kind)
        if thing.tint:
            found["colour"][on] = vocabulary["colour"].index(thing.tint)
        left, top, right, bottom = thing.box
        across = np.clip((middles - left) / (right - left) * 3, 0, 2).astype(int)
        down = np.clip((middles - top) / (bottom - top) * 3, 0, 2).astype(int)
        found["part"][on] = (3 * down[:, None] + across)[on]
        if corner := scene.quadrant(thing.box):
            found["corner"][on] = QUADRANTS.index(corner)
        found["column"][on] = (left + right) * GRID // (2 * scene.size)
        found["row"][on] = (top + bottom) * GRID // (2 * scene.size)
        found["count"][on] = sum(t.concept.name == thing.concept.name for t in scene.things) - 1
    found["name"][bare] = 0
    for half, sort in enumerate(LETTER_SORTS):
        for word in scene.words:
            found[sort] = letters(scene, word, grid, half)
        found["name"][found[sort] > 0] = UNKNOWN
    return np.stack([values.ravel() for values in found.values()])


def covered(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """[grid, grid] each: the number of the thing that takes most of a patch, or -1; and whether nothing is there."""
    edges = np.arange(grid + 1) * scene.size / grid
    owners, bare = np.full((grid, grid), -1), np.ones((grid, grid), bool)
    for number, thing in enumerate(scene.things):
        left, top, right, bottom = thing.box
        share = np.outer(overlap(edges, top, bottom), overlap(edges, left, right))
        owners[share >= COVERED] = number
        bare &= share < BARE
    return owners, bare


def overlap(edges: np.ndarray, start: float, end: float) -> np.ndarray:
    """[grid]: the share of each column (or row) between `edges` that lies between `start` and `end`."""
    shared = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
    return np.clip(shared, 0, None) / np.diff(edges)


def letters(scene: Scene, word: Word, grid: int, half: int) -> np.ndarray:
    """[grid, grid]: 1 + the letter whose middle lies in the left (0) or right (1) half of each patch, 0 where none."""
    found = np.zeros((grid, grid), int)
    (_, top, _, bottom), middles = words.placed(word)
    rows = overlap(np.arange(grid + 1) * scene.size / grid, top, bottom)
    rows = rows >= 0.6 * rows.max()
    for letter, middle in zip(reversed(word.text), reversed(middles), strict=True):  # of two, the first stays
        column, side = divmod(int(middle * 2 * grid / scene.size), 2)
        if side == half and column < grid:
            found[rows, column] = 1 + LETTERS.index(letter)
    return found


def raster(scene: Scene, grid: int = GRID) -> str:
    """A word for each patch, row by row: the colour of the background, letters, or the next word of the thing there,
    'a' and its name again and again. It is to a language model what the picture's tokens will be, place for place."""
    owners, _ = covered(scene, grid)
    said = np.full((grid, grid), scene.background, dtype=object)
    for number, thing in enumerate(scene.things):
        named = [*((thing.tint,) if thing.tint else ()), *thing.concept.name.split()]
        rows, columns = np.nonzero(owners == number)
        again = islice(cycle(named), max(0, len(rows) - (len(rows) > len(named))))
        for row, column, text in zip(rows, columns, ["a"] * (len(rows) > len(named)) + list(again), strict=True):
            said[row, column] = text
    for word in scene.words:
        one, two = (letters(scene, word, grid, half) for half in (0, 1))
        for row, column in zip(*np.nonzero(one + two), strict=True):
            said[row, column] = "".join(LETTERS[i - 1] for i in (one[row, column], two[row, column]) if i)
    return " ".join(said.ravel())
