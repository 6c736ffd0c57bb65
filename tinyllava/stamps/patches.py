"""What each patch of an image shows, in words.

The vision tower of the package is pretrained on these words (nano_tower.py), and its LLM reads them in the place of an
image (`write_raster`).

A caption describes a whole image in one line, so a tower must find out which word belongs where. Here every patch of a
G x G grid has its own words: the thing in it (or nothing), the kind of thing, its colour, which part of the thing the
patch shows, where in the image the thing is, how many of it and how many things there are, the letters written in the
patch, and the colour of the background.
"""

from collections.abc import Iterable
from itertools import chain, cycle, islice

import numpy as np

from tinyllava.stamps import words
from tinyllava.stamps.compose import BACKGROUNDS, QUADRANTS, Scene, Thing, Word
from tinyllava.stamps.library import TINTS, load_library

GRID = 6  # patches a side of the nano tower
UNKNOWN = -100  # the patch has no certain word of this sort; cross entropy ignores this index
COVERED = 0.4  # a thing that takes at least this share of a patch is what the patch shows
BARE = 0.12  # a patch of which every thing takes less than this share shows nothing
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# A patch shows up to two letters, one in each half.
LETTER_SORTS = ("letter on the left", "letter on the right")
COUNTS = ("one", "two", "three", "four", "five", "six")
COLUMNS, ROWS = (tuple(f"{side} {n}" for n in range(1, GRID + 1)) for side in ("column", "row"))
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "middle", "right"))


def build_vocabulary(concepts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the sorts of words that a patch can have, and the words of each sort.

    The first name and the first letter are 'nothing'.
    """
    concepts = tuple(concepts)
    kinds = tuple(sorted({kind for name in concepts if (kind := load_library().concepts[name].kind)}))
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


def label_patches(scene: Scene, grid: int, vocabulary: dict[str, tuple[str, ...]]) -> np.ndarray:
    """Return int64 [sorts, grid * grid]: the index of each patch's word of each sort, or UNKNOWN.

    Patches are in raster order.
    """
    labels = {sort: np.full((grid, grid), UNKNOWN) for sort in vocabulary}
    labels["background"][:] = vocabulary["background"].index(scene.background)
    if scene.things:
        labels["things"][:] = len(scene.things) - 1
    owners, bare = find_owners(scene, grid)
    for number, thing in enumerate(scene.things):
        _label_thing(labels, owners == number, scene, thing, vocabulary)
    labels["name"][bare] = 0
    for half, sort in enumerate(LETTER_SORTS):
        for word in scene.words:
            labels[sort] = index_letters(scene, word, grid, half)
        labels["name"][labels[sort] > 0] = UNKNOWN
    return np.stack([values.ravel() for values in labels.values()])


def _label_thing(
    labels: dict[str, np.ndarray], on: np.ndarray, scene: Scene, thing: Thing, vocabulary: dict[str, tuple[str, ...]]
) -> None:
    """Write the labels of one thing into the patches `on` it, a bool [grid, grid]."""
    labels["name"][on] = vocabulary["name"].index(thing.concept.name)
    if thing.concept.kind:
        labels["kind"][on] = vocabulary["kind"].index(thing.concept.kind)
    if thing.tint:
        labels["colour"][on] = vocabulary["colour"].index(thing.tint)
    left, top, right, bottom = thing.box
    grid = len(on)
    middles = (np.arange(grid) + 0.5) * scene.size / grid
    across = np.clip((middles - left) / (right - left) * 3, 0, 2).astype(int)
    down = np.clip((middles - top) / (bottom - top) * 3, 0, 2).astype(int)
    labels["part"][on] = (3 * down[:, None] + across)[on]
    if corner := scene.find_quadrant(thing.box):
        labels["corner"][on] = QUADRANTS.index(corner)
    labels["column"][on] = (left + right) * GRID // (2 * scene.size)
    labels["row"][on] = (top + bottom) * GRID // (2 * scene.size)
    labels["count"][on] = sum(t.concept.name == thing.concept.name for t in scene.things) - 1


def find_owners(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays [grid, grid]: the number of the thing that each patch shows, or -1; and whether it is bare."""
    edges = np.arange(grid + 1) * scene.size / grid
    owners, bare = np.full((grid, grid), -1), np.ones((grid, grid), bool)
    for number, thing in enumerate(scene.things):
        left, top, right, bottom = thing.box
        share = np.outer(measure_overlap(edges, top, bottom), measure_overlap(edges, left, right))
        owners[share >= COVERED] = number
        bare &= share < BARE
    return owners, bare


def measure_overlap(edges: np.ndarray, start: float, end: float) -> np.ndarray:
    """Return [grid]: the share of each column (or row) between `edges` that lies between `start` and `end`."""
    shared = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
    return np.clip(shared, 0, None) / np.diff(edges)


def index_letters(scene: Scene, word: Word, grid: int, half: int) -> np.ndarray:
    """Return [grid, grid]: 1 + the index of the letter whose middle lies in that half of each patch, or 0.

    `half` is 0 for the left half and 1 for the right half.
    """
    letters = np.zeros((grid, grid), int)
    (_, top, _, bottom), middles = words.locate_letters(word)
    rows = measure_overlap(np.arange(grid + 1) * scene.size / grid, top, bottom)
    rows = rows >= 0.6 * rows.max()
    # Backwards, so that the first of two letters in the same half remains.
    for letter, middle in zip(reversed(word.text), reversed(middles), strict=True):
        column, side = divmod(int(middle * 2 * grid / scene.size), 2)
        if side == half and column < grid:
            letters[rows, column] = 1 + LETTERS.index(letter)
    return letters


def write_raster(scene: Scene, grid: int = GRID) -> str:
    """Write a word for each patch, row by row: the colour of the background, letters, or a word of the thing there.

    The patches of a thing read 'a', then its tint and name again and again. Each word has the place that the image's
    token will have for the LLM.
    """
    owners, _ = find_owners(scene, grid)
    patch_words = np.full((grid, grid), scene.background, dtype=object)
    for number, thing in enumerate(scene.things):
        name = [*((thing.tint,) if thing.tint else ()), *thing.concept.name.split()]
        rows, columns = np.nonzero(owners == number)
        # The article takes a patch only if there is one more than the name needs.
        article = ["a"] if len(rows) > len(name) else []
        texts = islice(chain(article, cycle(name)), len(rows))
        for row, column, text in zip(rows, columns, texts, strict=True):
            patch_words[row, column] = text
    for word in scene.words:
        left, right = (index_letters(scene, word, grid, half) for half in (0, 1))
        for row, column in zip(*np.nonzero(left + right), strict=True):
            letters = (left[row, column], right[row, column])
            patch_words[row, column] = "".join(LETTERS[i - 1] for i in letters if i)
    return " ".join(patch_words.ravel())
