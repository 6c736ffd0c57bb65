"""Questions with certain answers about a scene, one function a kind.

A kind is called with the scene and, where the answer was chosen first (the balanced test), with that answer; it gives
None where the scene does not fit. Every answer is one word or two, so that exact match scores it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tinyllava.data.stamps.compose import BACKGROUNDS, QUADRANTS, Scene, Thing
from tinyllava.data.stamps.library import TINTS, library

# what "What kind of thing is it?" may answer: categories whose name says it
KINDS_OF_THING = (
    "animal", "food", "vehicle", "plant", "clothing", "musical instrument", "building", "toy", "tool", "drink",
)  # fmt: skip
# what stands before a name when asked for its place: clear of each other in this direction
DIRECTIONS = {
    "left": ("left", "right"),
    "right": ("left", "right"),
    "above": ("above", "below"),
    "below": ("above", "below"),
}


@dataclass(frozen=True)
class Question:
    """One question, its answer, and what else is right (`accept`) or offered (`options`)."""

    text: str
    answer: str
    category: str
    accept: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """What a question may draw on: the concepts of the tier that may be named, and its largest count."""

    concepts: tuple[str, ...]
    most: int


Kind = Callable[[Scene, Context, Random, str | None], Question | None]
KINDS: dict[str, Kind] = {}


def kind(function: Kind) -> Kind:
    """Register a kind under its function's name, which is also the category that scores are reported by."""
    KINDS[function.__name__] = function
    return function


@kind
def naming(scene: Scene, context: Context, rng: Random, want: str | None = None) -> Question | None:
    if len(scene.things) != 1 or (want and scene.things[0].concept.name != want):
        return None
    text = rng.choice(["What is in the picture?", "What is this?", "What does the picture show?"])
    concept = scene.things[0].concept
    return Question(text, concept.name, "naming", (concept.phrase,) if concept.phrase != concept.name else ())


@kind
def category(scene: Scene, context: Context, rng: Random, want: str | None = None) -> Question | None:
    if len(scene.things) != 1:
        return None
    answer = scene.things[0].concept.category
    if answer not in KINDS_OF_THING or (want and answer != want):
        return None
    text = rng.choice(["What kind of thing is in the picture?", "What kind of thing is this?"])
    return Question(text, answer, "category")


@kind
def existence(scene: Scene, context: Context, rng: Random, want: str | None = None) -> Question | None:
    want = want or rng.choice(["yes", "no"])
    if want == "yes":
        concept = rng.choice(scene.things).concept
    else:
        near = set().union(*(library().near(t.concept.name) for t in scene.things))
        concept = library().concepts[rng.choice([c for c in context.concepts if c not in near])]
    forms = [f"Can you see {concept.phrase} in the picture?", f"Does the picture show {concept.phrase}?"]
    if concept.noun == "count":
        forms.append(f"Is there {concept.phrase} in the picture?")
    return Question(rng.choice(forms), want, "existence")


@kind
def counting(scene: Scene, context: Context, rng: Random, want: str | None = None) -> Question | None:
    if not all(t.concept.countable for t in scene.things):
        return None
    names = [t.concept.name for t in scene.things]
    name = rng.choice([*dict.fromkeys(names), None])
    answer = str(names.count(name) if name else len(names))
    if want and answer != want:
        return None
    noun = library().concepts[name].plural if name else "things"
    text = rng.choice([f"How many {noun} are in the picture?", f"How many {noun} are there?", f"Count the {noun}."])
    return Question(text, answer, "counting")


@kind
def quadrant(scene: Scene, context: Context, rng: Random, want: str | None = None) -> Question | None:
    known = [(t, q) for t in scene.unique() if (q := scene.quadrant(t.box)) and want in (None, q)]
    if not known:
        return None
    thing, answer = rng.choice(known)
    name = thing.concept.name
    text = rng.choice([f"In which corner is the {name}?", f"Where is the {name}?", f"Which corner is the {name} in?"])
    return Question(text, answer, "quadrant")


def relation(one: Thing, other: Thing) -> list[str]:
    """Where `one` is, seen from `other`: only directions in which the boxes do not overlap."""
    a, b = one.box, other.box
    found = ["left"] if a[2] <= b[0] else ["right"] if a[0] >= b[2] else []
    return found + (["above"] if a[3] <= b[1] else ["below"] if a[1] >= b[3] else [])


@kind
def spatial(scene: Scene, context: Context, rng: Random, want: str | None = None) -> Question | None:
    things = scene.unique()
    pairs = [(a, b, r) for a in things for b in things if a is not b for r in relation(a, b) if want in (None, r)]
    if not pairs:
        return None
    a, b, answer = rng.choice(pairs)
    one, other = a.concept.name, b.concept.name
    if answer in ("left", "right"):
        text = rng.choice(
            [f"Is the {one} left or right of the {other}?", f"Is the {one} to the left or right of the {other}?"]
        )
    else:
        text = rng.choice(
            [
                f"Is the {one} above or below the {other}?",
                f"Is the {one} higher or lower than the {other}, above or below?",
            ]
        )
    return Question(text, answer, "spatial")


@kind
def colour(scene: Scene, context: Context, rng: Random, want: str | None = None) -> Question | None:
    known = [t for t in scene.unique() if t.tint and want in (None, t.tint)]
    if not known:
        return None
    thing = rng.choice(known)
    text = rng.choice(
        [f"What colour is the {thing.concept.name}?", f"Which colour does the {thing.concept.name} have?"]
    )
    return Question(text, thing.tint, "colour")


@kind
def background_colour(scene: Scene, context: Context, rng: Random, want: str | None = None) -> Question | None:
    if want not in (None, scene.background):
        return None
    text = rng.choice(["What colour is the background?", "Which colour does the background have?"])
    return Question(text, scene.background, "background_colour", ("grey",) if scene.background == "gray" else ())


@kind
def corner_naming(scene: Scene, context: Context, rng: Random, want: str | None = None) -> Question | None:
    """Trained, not tested: what is in a given corner; the other way round of `quadrant`."""
    known = [(t, q) for t in scene.things if (q := scene.quadrant(t.box))]
    if not known:
        return None
    thing, place = rng.choice(known)
    return Question(
        rng.choice([f"What is in the {place} corner?", f"What is at the {place}?"]), thing.concept.name, "corner_naming"
    )


def caption(scene: Scene) -> str:
    """Everything that can be asked about the scene in one line: number, background, each thing with its place."""
    parts = []
    for thing in sorted(scene.things, key=lambda t: (QUADRANTS.index(q) if (q := scene.quadrant(t.box)) else 0, t.box)):
        name = thing.concept.name if thing.concept.noun != "count" else thing.concept.phrase
        if thing.tint:
            name = name if thing.concept.noun != "count" else thing.concept.name
            name = (
                f"{'an' if thing.tint[0] in 'aeiou' else 'a'} {thing.tint} {name}"
                if thing.concept.noun == "count"
                else f"{thing.tint} {name}"
            )
        place = scene.quadrant(thing.box)
        parts.append(f"{name} {place}" if place else name)
    count = len(scene.things)
    return f"{count} thing{'s' * (count != 1)} on a {scene.background} background: {', '.join(parts)}."
