"""Scenes: what stands where on which background, and the picture of it.

`compose` decides everything that a question may be about, with plain random numbers, so that questions and boxes are
the same on every machine. `render` only draws: its pixels may differ a little between versions of Pillow.
"""

from dataclasses import dataclass, field
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from tinyllava.data.stamps.library import TINTS, Concept, Drawing, font, library

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
    """One drawing in a picture."""

    concept: Concept
    drawing: Drawing
    box: Box
    tint: str | None = None
    flip: bool = False
    shade: tuple[float, float] = (1.0, 1.0)  # factors of its saturation and brightness


@dataclass(frozen=True)
class Word:
    """A word written into a box, in a font of the package."""

    text: str
    font: str
    box: Box
    dark: bool


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn."""

    size: int
    background: str
    shades: tuple[tuple[int, int, int], tuple[int, int, int]]
    pattern: str  # plain, gradient, stripes, dots
    things: tuple[Thing, ...] = ()
    words: tuple[Word, ...] = field(default=())

    def quadrant(self, box: Box) -> str | None:
        """The quarter of the picture that the box lies in as a whole, if it does."""
        half = self.size / 2
        row = "top" if box[3] <= half else "bottom" if box[1] >= half else None
        column = "left" if box[2] <= half else "right" if box[0] >= half else None
        return f"{row} {column}" if row and column else None

    def unique(self) -> list[Thing]:
        """Countable things whose concept is in the picture once: the ones that can be asked for by name."""
        names = [t.concept.name for t in self.things]
        return [t for t in self.things if t.concept.countable and names.count(t.concept.name) == 1]


def background(rng: Random, patterns: tuple[str, ...], avoid: frozenset[str] = frozenset()) -> dict:
    """The fields of a Scene that concern its background. `avoid`: where a thing on it could not be seen."""
    name = rng.choice([c for c in BACKGROUNDS if c not in avoid] or list(BACKGROUNDS))
    jitter = (
        [rng.randint(-12, 12) for _ in range(3)] if name not in ("white", "gray", "black") else [rng.randint(-8, 5)] * 3
    )
    base = [min(255, max(0, c + j)) for c, j in zip(BACKGROUNDS[name], jitter, strict=True)]
    factor = rng.uniform(0.82, 0.95)
    other = [round(c * factor) for c in base] if name != "black" else [c + 18 for c in base]
    shades = (tuple(base), tuple(other)) if rng.random() < 0.5 else (tuple(other), tuple(base))
    return {"background": name, "shades": shades, "pattern": rng.choice(patterns)}


def compose(
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
    """A scene of `count` things from `concepts`, each in one of its first `drawings`: `copies` of the first thing
    (named by `first` or drawn), the others all different and not near each other. `fill` is the least share of its cell
    that a thing takes. A single thing is large and anywhere, or with `placed` inside a quadrant. With `jitter`
    saturation and brightness are a little off."""
    names = _choose(rng, concepts, count, copies, first)
    things = []
    for name, cell in zip(names, _cells(rng, size, count, placed, fill), strict=True):
        concept = library().concepts[name]
        drawing = rng.choice(concept.drawings[:drawings])
        tint = rng.choice(list(TINTS)) if drawing.hue is not None else None
        image = library().image(drawing)
        box, flip = _fit(rng, cell, image.width / image.height), flips and rng.random() < 0.5
        shade = (rng.uniform(0.7, 1.3), rng.uniform(0.8, 1.2)) if jitter else (1.0, 1.0)
        things.append(Thing(concept, drawing, box, tint, flip, shade))
    hiding = (name for t in things for name in ((t.tint,) if t.tint else t.drawing.hidden_on))
    ground = background(rng, patterns, frozenset(hiding))
    return Scene(size, things=tuple(things), **ground)


def _choose(rng: Random, concepts: tuple[str, ...], count: int, copies: int, first: str | None) -> list[str]:
    """Concept names: `copies` equal ones (countable if more than one), then others that are near none of them."""
    while first is None or (copies > 1 and not library().concepts[first].countable):
        first = rng.choice(concepts)
    names = [first] * copies
    taken = set(library().near(first))
    while len(names) < count:
        name = rng.choice(concepts)
        if name not in taken:
            names.append(name)
            taken |= library().near(name)
    return names


def _cells(rng: Random, size: int, count: int, placed: bool, fill: float) -> list[tuple[Box, float]]:
    """For each thing the cell that it must lie in and the length of its longer side."""
    if count == 1 and not placed:
        return [((0, 0, size, size), size * rng.uniform(0.75 * fill, 0.95))]
    grid = 2 if count <= 4 else 3
    step = size // grid
    cells = [(x * step, y * step, (x + 1) * step, (y + 1) * step) for y in range(grid) for x in range(grid)]
    return [(cell, step * rng.uniform(fill, 1.0)) for cell in rng.sample(cells, count)]


def _fit(rng: Random, cell: tuple[Box, float], aspect: float) -> Box:
    (left, top, right, bottom), side = cell
    width = max(4, round(side * min(1.0, aspect)))
    height = max(4, round(side * min(1.0, 1 / aspect)))
    x, y = rng.randint(left, right - width), rng.randint(top, bottom - height)
    return x, y, x + width, y + height


def render(scene: Scene) -> Image.Image:
    """Draw the scene as an RGB picture."""
    picture = _ground(scene)
    for thing in scene.things:
        image = library().image(thing.drawing, thing.tint)
        left, top, right, bottom = thing.box
        image = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, reducing_gap=2.0)
        if thing.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if thing.shade != (1.0, 1.0):
            saturation, brightness = thing.shade
            image = ImageEnhance.Brightness(ImageEnhance.Color(image).enhance(saturation)).enhance(brightness)
        picture.paste(image, (left, top), image)
    for word in scene.words:
        _write(picture, word)
    return picture


def _ground(scene: Scene) -> Image.Image:
    size, (one, two) = scene.size, scene.shades
    picture = Image.new("RGB", (size, size), one)
    if scene.pattern == "gradient":
        ramp = np.linspace(0, 1, size)[:, None, None]
        rows = np.broadcast_to((1 - ramp) * np.array(one) + ramp * np.array(two), (size, size, 3))
        picture = Image.fromarray(rows.round().astype(np.uint8))
    elif scene.pattern in ("stripes", "dots"):
        draw, step = ImageDraw.Draw(picture), size // 8
        for i in range(0, size, step):
            if scene.pattern == "stripes":
                draw.rectangle((i, 0, i + step // 2 - 1, size), fill=two)
            else:
                for j in range(0, size, step):
                    draw.ellipse((i, j, i + step // 2, j + step // 2), fill=two)
    return picture


def ink(word: Word) -> Box:
    """Where the word stands in its box: as large as fits, in the middle."""
    left, top, right, bottom = font(word.font).getbbox(word.text)
    x0, y0, x1, y1 = word.box
    scale = min((x1 - x0) / (right - left), (y1 - y0) / (bottom - top))
    width, height = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    x, y = x0 + (x1 - x0 - width) // 2, y0 + (y1 - y0 - height) // 2
    return x, y, x + width, y + height


def _write(picture: Image.Image, word: Word) -> None:
    """Write at a large size, then shrink into the box: no font's metrics decide where the word is."""
    letters = font(word.font)
    left, top, right, bottom = letters.getbbox(word.text)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), word.text, font=letters, fill=255)
    x0, y0, x1, y1 = box = ink(word)
    mask = mask.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS)
    picture.paste((20, 20, 20) if word.dark else (245, 245, 245), box, mask)
