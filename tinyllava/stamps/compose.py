"""Scenes: which things are where on which background, and the image of them.

`compose_scene` decides everything that a question may be about, with Python's random numbers only, so that questions
and boxes are the same on every machine. `draw_scene` only draws. Its pixels may differ a little between versions of
Pillow.
"""

from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from tinyllava.stamps.library import TINTS, Concept, Drawing, load_font, load_library

BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (140, 140, 140),
    "black": (28, 28, 28),
    "blue": (105, 150, 235),
    "green": (110, 190, 105),
    "yellow": (250, 222, 95),
    "pink": (250, 165, 200),
    "purple": (150, 100, 200),
}
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Thing:
    """One drawing in an image."""

    concept: Concept
    drawing: Drawing
    box: Box
    tint: str | None = None
    flip: bool = False
    shade: tuple[float, float] = (1.0, 1.0)  # factors of its saturation and brightness


@dataclass(frozen=True)
class Word:
    """A word written into a box, in a font of the package. `dark`: dark letters on a light background."""

    text: str
    font: str
    box: Box
    dark: bool


@dataclass(frozen=True)
class Scene:
    """An image before it is drawn."""

    size: int  # pixels a side
    background: str
    shades: tuple[tuple[int, int, int], tuple[int, int, int]]
    pattern: str  # plain, gradient, stripes, dots
    things: tuple[Thing, ...] = ()
    words: tuple[Word, ...] = field(default=())

    def find_quadrant(self, box: Box) -> str | None:
        """Return the quarter of the image that contains the whole box, or None if the box crosses a middle line."""
        half = self.size / 2
        row = "top" if box[3] <= half else "bottom" if box[1] >= half else None
        column = "left" if box[2] <= half else "right" if box[0] >= half else None
        return f"{row} {column}" if row and column else None

    def list_unique_things(self) -> list[Thing]:
        """Return the countable things whose concept occurs once: a question can identify them by name."""
        names = [t.concept.name for t in self.things]
        return [t for t in self.things if t.concept.countable and names.count(t.concept.name) == 1]


class Cell(NamedTuple):
    """Where a thing must lie, and the length of its longer side in pixels."""

    box: Box
    side: float


def choose_background(rng: Random, patterns: tuple[str, ...], avoid: frozenset[str] = frozenset()) -> dict:
    """Return the fields of a Scene about its background. `avoid`: the colours in which a thing would be invisible."""
    name = rng.choice([c for c in BACKGROUNDS if c not in avoid] or list(BACKGROUNDS))
    if name in ("white", "gray", "black"):  # the same change for all channels: another would add a colour
        jitter = [rng.randint(-8, 5)] * 3
    else:
        jitter = [rng.randint(-12, 12) for _ in range(3)]
    base = [min(255, max(0, c + j)) for c, j in zip(BACKGROUNDS[name], jitter, strict=True)]
    factor = rng.uniform(0.82, 0.95)
    shade = [round(c * factor) for c in base] if name != "black" else [c + 18 for c in base]
    shades = (tuple(base), tuple(shade)) if rng.random() < 0.5 else (tuple(shade), tuple(base))
    return {"background": name, "shades": shades, "pattern": rng.choice(patterns)}


def compose_scene(
    rng: Random,
    size: int,
    concepts: tuple[str, ...],
    count: int,
    patterns: tuple[str, ...] = ("plain", "gradient"),
    drawings: int | None = None,
    flips: bool = True,
    fill: float = 0.75,
    copies: int = 1,
    first: str | None = None,
    placed: bool = False,
    jitter: bool = False,
) -> Scene:
    """Compose a scene of `count` things from `concepts`, each with one of the first `drawings` of its concept.

    There are `copies` of the first thing, whose concept is `first` or a random one. The other things all have different
    concepts, none near another. A thing takes at least the share `fill` of its cell. A single thing is large and lies
    anywhere, or inside a quadrant with `placed`. `jitter` changes saturation and brightness a little.
    """
    names = _choose_concepts(rng, concepts, count, copies, first)
    things = []
    for name, cell in zip(names, _choose_cells(rng, size, count, placed, fill), strict=True):
        concept = load_library().concepts[name]
        drawing = rng.choice(concept.drawings[:drawings])
        tint = rng.choice(list(TINTS)) if drawing.hue is not None else None
        image = load_library().load_image(drawing)
        box = _place_in_cell(rng, cell, image.width / image.height)
        flip = flips and rng.random() < 0.5
        shade = (rng.uniform(0.7, 1.3), rng.uniform(0.8, 1.2)) if jitter else (1.0, 1.0)
        things.append(Thing(concept, drawing, box, tint, flip, shade))
    hiding = (name for t in things for name in ((t.tint,) if t.tint else t.drawing.hidden_on))
    background = choose_background(rng, patterns, frozenset(hiding))
    return Scene(size, things=tuple(things), **background)


def _choose_concepts(rng: Random, concepts: tuple[str, ...], count: int, copies: int, first: str | None) -> list[str]:
    """Choose concept names: `copies` equal ones, then others that are near none of them.

    Equal ones are always countable.
    """
    while first is None or (copies > 1 and not load_library().concepts[first].countable):
        first = rng.choice(concepts)
    names = [first] * copies
    taken = set(load_library().list_near(first))
    while len(names) < count:
        name = rng.choice(concepts)
        if name not in taken:
            names.append(name)
            taken |= load_library().list_near(name)
    return names


def _choose_cells(rng: Random, size: int, count: int, placed: bool, fill: float) -> list[Cell]:
    """Choose a cell of a grid for each thing: 2 x 2 for up to four things, else 3 x 3."""
    if count == 1 and not placed:
        return [Cell((0, 0, size, size), size * rng.uniform(0.75 * fill, 0.95))]
    grid = 2 if count <= 4 else 3
    step = size // grid
    boxes = [(x * step, y * step, (x + 1) * step, (y + 1) * step) for y in range(grid) for x in range(grid)]
    return [Cell(box, step * rng.uniform(fill, 1.0)) for box in rng.sample(boxes, count)]


def _place_in_cell(rng: Random, cell: Cell, aspect: float) -> Box:
    """Choose the box of a drawing of this aspect ratio (width / height) inside its cell."""
    left, top, right, bottom = cell.box
    width = max(4, round(cell.side * min(1.0, aspect)))
    height = max(4, round(cell.side * min(1.0, 1 / aspect)))
    x, y = rng.randint(left, right - width), rng.randint(top, bottom - height)
    return x, y, x + width, y + height


def draw_scene(scene: Scene) -> Image.Image:
    """Draw the scene as an RGB image."""
    image = _draw_background(scene)
    for thing in scene.things:
        drawing = load_library().load_image(thing.drawing, thing.tint)
        left, top, right, bottom = thing.box
        drawing = drawing.resize((right - left, bottom - top), Image.Resampling.BILINEAR, reducing_gap=2.0)
        if thing.flip:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if thing.shade != (1.0, 1.0):
            saturation, brightness = thing.shade
            drawing = ImageEnhance.Brightness(ImageEnhance.Color(drawing).enhance(saturation)).enhance(brightness)
        image.paste(drawing, (left, top), drawing)
    for word in scene.words:
        _draw_word(image, word)
    return image


def _draw_background(scene: Scene) -> Image.Image:
    size = scene.size
    first, second = scene.shades
    image = Image.new("RGB", (size, size), first)
    if scene.pattern == "gradient":
        ramp = np.linspace(0, 1, size)[:, None, None]
        rows = np.broadcast_to((1 - ramp) * np.array(first) + ramp * np.array(second), (size, size, 3))
        image = Image.fromarray(rows.round().astype(np.uint8))
    elif scene.pattern in ("stripes", "dots"):
        draw = ImageDraw.Draw(image)
        step = size // 8
        for i in range(0, size, step):
            if scene.pattern == "stripes":
                draw.rectangle((i, 0, i + step // 2 - 1, size), fill=second)
            else:
                for j in range(0, size, step):
                    draw.ellipse((i, j, i + step // 2, j + step // 2), fill=second)
    return image


def fit_word(word: Word) -> Box:
    """Return the box that the letters take inside the word's box: as large as fits, in the middle."""
    left, top, right, bottom = load_font(word.font).getbbox(word.text)
    x0, y0, x1, y1 = word.box
    scale = min((x1 - x0) / (right - left), (y1 - y0) / (bottom - top))
    width, height = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    x, y = x0 + (x1 - x0 - width) // 2, y0 + (y1 - y0 - height) // 2
    return x, y, x + width, y + height


def _draw_word(image: Image.Image, word: Word) -> None:
    """Draw a word at a large size, then shrink it into its box, so that no font's metrics decide where the word is."""
    letters = load_font(word.font)
    left, top, right, bottom = letters.getbbox(word.text)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), word.text, font=letters, fill=255)
    x0, y0, x1, y1 = box = fit_word(word)
    mask = mask.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS)
    image.paste((20, 20, 20) if word.dark else (245, 245, 245), box, mask)
