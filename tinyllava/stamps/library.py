"""The drawings and the fonts: reads stamps.zip into concepts, each with one or more transparent drawings.

stamps.json in the zip holds the licence, source and author of every drawing. Its `near` lists groups of concepts that
look too similar to be told apart with certainty. Its `pruned` lists the drawings that were left out, with the reason.
"""

import io
import json
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from PIL import Image, ImageFont

# Hue in degrees, and factors for saturation and value: how a drawing of one hue gets another one.
TINTS = {
    "red": (357, 1.0, 1.0),
    "orange": (27, 1.0, 1.05),
    "yellow": (53, 1.0, 1.15),
    "green": (120, 0.9, 0.8),
    "blue": (222, 1.0, 1.0),
    "purple": (275, 0.9, 0.8),
    "pink": (330, 0.5, 1.15),
}
IRREGULAR = {
    "computer mouse": "computer mice",
    "die": "dice",
    "goose": "geese",
    "knife": "knives",
    "maple leaf": "maple leaves",
    "mosquito": "mosquitoes",
    "mouse": "mice",
    "potato": "potatoes",
    "scarf": "scarves",
    "snowman": "snowmen",
    "tomato": "tomatoes",
    "tornado": "tornadoes",
    "volcano": "volcanoes",
    "wolf": "wolves",
} | {
    name: name
    for name in ("fish", "blowfish", "jellyfish", "sheep", "deer", "moose", "shrimp", "fried shrimp", "squid")
}


@dataclass(frozen=True)
class Drawing:
    """One drawing of a concept.

    `hue` (degrees) is set if over 80 % of the area lies in one hue band. On the backgrounds in `hidden_on`, over half
    of the drawing has the colour of the background.
    """

    file: str
    hue: int | None = None
    hidden_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Concept:
    """Something that has a name.

    Only a countable concept may be counted, placed or compared: each of its drawings shows exactly one.
    """

    name: str
    kind: str | None  # animal, food, ...: only if everybody would agree
    countable: bool
    noun: str  # "count", "plural" (scissors) or "mass" (bread)
    drawings: tuple[Drawing, ...]

    @property
    def phrase(self) -> str:
        """The name as it appears in a sentence: 'a cat', 'an ant', 'scissors', 'bread'."""
        return self.name if self.noun != "count" else f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    @property
    def plural(self) -> str:
        """The plural of the name, without a count: 'cats', 'mice', 'butterflies'."""
        if self.name in IRREGULAR:
            return IRREGULAR[self.name]
        if self.name.endswith("y") and self.name[-2] not in "aeiou":
            return self.name[:-1] + "ies"
        return self.name + ("es" if self.name.endswith(("s", "x", "ch", "sh")) else "s")


class Library:
    """All concepts, and their drawings cropped to what is visible.

    Reads the zip once, and decodes a drawing on its first use.
    """

    def __init__(self) -> None:
        self._zip = zipfile.ZipFile(io.BytesIO(files(__package__).joinpath("stamps.zip").read_bytes()))
        record = json.loads(self._zip.read("stamps.json"))
        self.concepts = {
            name: Concept(
                name,
                entry.get("kind"),
                entry["countable"],
                entry.get("noun", "count"),
                tuple(Drawing(d["file"], d.get("hue"), tuple(d.get("hidden_on", ()))) for d in entry["drawings"]),
            )
            for name, entry in record["concepts"].items()
        }
        self._near: dict[str, set[str]] = {name: {name} for name in self.concepts}
        for group in record["near"]:
            for name in group:
                self._near[name].update(group)
        self._images: dict[tuple[str, str | None], Image.Image] = {}

    def list_near(self, name: str) -> set[str]:
        """Return the concept and those that look like it.

        They are never in one image, and a question never uses one as a wrong answer for another.
        """
        return self._near[name]

    def load_image(self, drawing: Drawing, tint: str | None = None) -> Image.Image:
        """Return the drawing as RGBA without its empty margin, in its own colours or in those of `tint`."""
        key = (drawing.file, tint)
        if key not in self._images:
            if tint is None:
                image = Image.open(io.BytesIO(self._zip.read(drawing.file))).convert("RGBA")
                self._images[key] = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
            else:
                self._images[key] = _tint_image(self.load_image(drawing), drawing.hue or 0, tint)
        return self._images[key]


def _tint_image(image: Image.Image, hue: int, tint: str) -> Image.Image:
    """Move every hue from around `hue` to `tint`. A third of its distance from `hue` remains, so that shading stays."""
    target, saturation, value = TINTS[tint]
    h, s, v = image.convert("RGB").convert("HSV").split()
    h = h.point([round((target + ((i * 360 / 256 - hue + 180) % 360 - 180) / 3) * 256 / 360) % 256 for i in range(256)])
    s = s.point([min(255, round(i * saturation)) for i in range(256)])
    v = v.point([min(255, round(i * value)) for i in range(256)])
    tinted = Image.merge("HSV", (h, s, v)).convert("RGB").convert("RGBA")
    tinted.putalpha(image.getchannel("A"))
    return tinted


@cache
def load_library() -> Library:
    """Return the library, read once per process."""
    return Library()


@cache
def load_font(name: str) -> ImageFont.FreeTypeFont:
    """Return a font of the package, read once per process."""
    # 48 pixels are larger than any word in an image: words are drawn at this size and then shrunk into their boxes.
    return ImageFont.truetype(io.BytesIO(files(__package__).joinpath("fonts", f"{name}.ttf").read_bytes()), 48)
