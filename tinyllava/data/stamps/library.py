"""The drawings and the fonts: stamps.zip read into concepts, each with one or more transparent drawings.

stamps.json in the zip names the licence, source and author of every drawing, which concepts are too near each other
to be told apart with certainty (`near`), and which drawings were left out and why (`pruned`).
"""

import io
import json
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from PIL import Image, ImageFont

# hue in degrees, factors for saturation and value: how a drawing of one hue is given another
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
    """One picture of a concept. `hue` (degrees) is set where over 80 % of the area lies in one hue band; on the
    backgrounds of `hidden_on` over half of it could not be told from the ground."""

    file: str
    hue: int | None = None
    hidden_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Concept:
    """A nameable thing. Only a countable one may be counted, placed or compared: its drawings show exactly one."""

    name: str
    kind: str | None  # animal, food, ...: only where everybody would say so
    countable: bool
    noun: str  # "count", "plural" (scissors) or "mass" (bread)
    drawings: tuple[Drawing, ...]

    @property
    def phrase(self) -> str:
        """The name as it stands in a sentence: 'a cat', 'an ant', 'scissors', 'bread'."""
        return self.name if self.noun != "count" else f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    @property
    def plural(self) -> str:
        if self.name in IRREGULAR:
            return IRREGULAR[self.name]
        if self.name.endswith("y") and self.name[-2] not in "aeiou":
            return self.name[:-1] + "ies"
        return self.name + ("es" if self.name.endswith(("s", "x", "ch", "sh")) else "s")


class Library:
    """All concepts, and their drawings cut to what is visible. Reads the zip once; decodes a drawing when asked."""

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

    def near(self, name: str) -> set[str]:
        """The concept and its near-synonyms: never a negative for it, never beside it in one picture."""
        return self._near[name]

    def image(self, drawing: Drawing, tint: str | None = None) -> Image.Image:
        """The drawing as RGBA without its empty margin, in its own colours or tinted."""
        key = (drawing.file, tint)
        if key not in self._images:
            if tint is None:
                image = Image.open(io.BytesIO(self._zip.read(drawing.file))).convert("RGBA")
                self._images[key] = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
            else:
                self._images[key] = _tinted(self.image(drawing), drawing.hue or 0, tint)
        return self._images[key]


def _tinted(image: Image.Image, hue: int, tint: str) -> Image.Image:
    """Move every hue to `tint`, keeping a third of its distance from the main band, so that shading stays."""
    target, saturation, value = TINTS[tint]
    h, s, v = image.convert("RGB").convert("HSV").split()
    h = h.point([round((target + ((i * 360 / 256 - hue + 180) % 360 - 180) / 3) * 256 / 360) % 256 for i in range(256)])
    s = s.point([min(255, round(i * saturation)) for i in range(256)])
    v = v.point([min(255, round(i * value)) for i in range(256)])
    out = Image.merge("HSV", (h, s, v)).convert("RGB").convert("RGBA")
    out.putalpha(image.getchannel("A"))
    return out


@cache
def library() -> Library:
    """The library, read once per process."""
    return Library()


@cache
def font(name: str) -> ImageFont.FreeTypeFont:
    """A font of the package, large: what is written with it is shrunk into its place."""
    return ImageFont.truetype(io.BytesIO(files(__package__).joinpath("fonts", f"{name}.ttf").read_bytes()), 48)
