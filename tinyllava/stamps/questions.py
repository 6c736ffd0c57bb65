"""Questions with certain answers about a scene, one function per kind.

A kind's function gets the scene and, if the answer was chosen first (in the balanced test), that answer as `want`. It
returns None if the scene does not fit. Every answer is a word or two, so that exact match can score it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tinyllava.stamps.compose import Scene, Thing
from tinyllava.stamps.library import load_library


@dataclass(frozen=True)
class SceneQuestion:
    """One question and its answer, other right answers (`accept`) and the choices offered (`options`).

    `asks` are the facts that one must see in the image to answer. Question and answer together reveal those facts, and
    the facts in `tells`. A conversation never asks for a fact that was revealed before: a model could answer without
    the image.
    """

    text: str
    answer: str
    category: str
    asks: tuple[str, ...]
    tells: tuple[str, ...] = ()
    accept: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """What a question may use: the concepts of the tier that may be named, and its largest count."""

    concepts: tuple[str, ...]
    most: int


Turn = tuple[str, str]  # a question and its answer
AskKind = Callable[[Scene, Context, Random, str | None], SceneQuestion | None]
QUESTION_KINDS: dict[str, AskKind] = {}


def register_kind(function: AskKind) -> AskKind:
    """Register `ask_NAME` as the kind NAME, which is also the category of its scores."""
    QUESTION_KINDS[function.__name__.removeprefix("ask_")] = function
    return function


@register_kind
def ask_naming(scene: Scene, context: Context, rng: Random, want: str | None) -> SceneQuestion | None:
    """Ask what the only thing is."""
    if len(scene.things) != 1 or want not in (None, scene.things[0].concept.name):
        return None
    concept = scene.things[0].concept
    text = rng.choice(["What is in the picture?", "What is this?", "What does the picture show?"])
    accept = (concept.phrase,) if concept.noun == "count" else ()
    return SceneQuestion(text, concept.name, "naming", (f"name {concept.name}",), accept=accept)


@register_kind
def ask_category(scene: Scene, context: Context, rng: Random, want: str | None) -> SceneQuestion | None:
    """Ask what kind of thing the only thing is."""
    answer = scene.things[0].concept.kind if len(scene.things) == 1 else None
    if answer is None or want not in (None, answer):
        return None
    text = rng.choice(["What kind of thing is in the picture?", "What kind of thing is this?"])
    return SceneQuestion(text, answer, "category", (f"name {scene.things[0].concept.name}", "category"))


@register_kind
def ask_existence(scene: Scene, context: Context, rng: Random, want: str | None) -> SceneQuestion | None:
    """Ask whether something is in the image. The answers yes and no are equally frequent."""
    want = want or rng.choice(["yes", "no"])
    if want == "yes":
        concept = rng.choice(scene.things).concept
    else:
        near = set().union(*(load_library().list_near(t.concept.name) for t in scene.things))
        concept = load_library().concepts[rng.choice([c for c in context.concepts if c not in near])]
    forms = [f"Can you see {concept.phrase} in the picture?", f"Does the picture show {concept.phrase}?"]
    if concept.noun == "count":
        forms.append(f"Is there {concept.phrase} in the picture?")
    return SceneQuestion(rng.choice(forms), want, "existence", (f"name {concept.name}",))


@register_kind
def ask_counting(scene: Scene, context: Context, rng: Random, want: str | None) -> SceneQuestion | None:
    """Ask how many there are of one concept, or of all things."""
    if not all(t.concept.countable for t in scene.things):
        return None
    names = [t.concept.name for t in scene.things]
    name = rng.choice([*dict.fromkeys(names), None])
    answer = str(names.count(name) if name else len(names))
    if want not in (None, answer):
        return None
    noun = load_library().concepts[name].plural if name else "things"
    text = rng.choice([f"How many {noun} are in the picture?", f"How many {noun} are there?", f"Count the {noun}."])
    return SceneQuestion(text, answer, "counting", ("count",), (f"name {name}",) if name else ())


@register_kind
def ask_quadrant(scene: Scene, context: Context, rng: Random, want: str | None) -> SceneQuestion | None:
    """Ask in which corner a thing is."""
    corners = [(t.concept.name, scene.find_quadrant(t.box)) for t in scene.list_unique_things()]
    corners = [(name, corner) for name, corner in corners if corner and want in (None, corner)]
    if not corners:
        return None
    name, answer = rng.choice(corners)
    text = rng.choice([f"In which corner is the {name}?", f"Where is the {name}?", f"Which corner is the {name} in?"])
    return SceneQuestion(text, answer, "quadrant", (f"place {name}",), (f"name {name}", "count"))


def find_relations(thing: Thing, reference: Thing) -> list[str]:
    """Return where `thing` is, seen from `reference`: only directions in which their boxes do not overlap."""
    a, b = thing.box, reference.box
    across = ["left"] if a[2] <= b[0] else ["right"] if a[0] >= b[2] else []
    down = ["above"] if a[3] <= b[1] else ["below"] if a[1] >= b[3] else []
    return across + down


@register_kind
def ask_spatial(scene: Scene, context: Context, rng: Random, want: str | None) -> SceneQuestion | None:
    """Ask on which side of another thing a thing is."""
    things = scene.list_unique_things()
    pairs = [(a, b, r) for a in things for b in things if a is not b for r in find_relations(a, b) if want in (None, r)]
    if not pairs:
        return None
    thing, reference, answer = rng.choice(pairs)
    a, b = thing.concept.name, reference.concept.name
    if answer in ("left", "right"):
        forms = [f"Is the {a} left or right of the {b}?", f"Is the {a} to the left or right of the {b}?"]
    else:
        forms = [f"Is the {a} above or below the {b}?", f"Is the {a} over or under the {b}, above or below?"]
    asks, tells = (f"place {a}", f"place {b}"), (f"name {a}", f"name {b}", "count")
    return SceneQuestion(rng.choice(forms), answer, "spatial", asks, tells)


@register_kind
def ask_colour(scene: Scene, context: Context, rng: Random, want: str | None) -> SceneQuestion | None:
    """Ask for the colour of a tinted thing."""
    known = [t for t in scene.list_unique_things() if t.tint and want in (None, t.tint)]
    if not known:
        return None
    thing = rng.choice(known)
    name = thing.concept.name
    text = rng.choice([f"What colour is the {name}?", f"Which colour does the {name} have?"])
    return SceneQuestion(text, thing.tint, "colour", (f"colour {name}",), (f"name {name}", "count"))


@register_kind
def ask_background_colour(scene: Scene, context: Context, rng: Random, want: str | None) -> SceneQuestion | None:
    """Ask for the colour of the background."""
    if want not in (None, scene.background):
        return None
    text = rng.choice(["What colour is the background?", "Which colour does the background have?"])
    accept = ("grey",) if scene.background == "gray" else ()
    return SceneQuestion(text, scene.background, "background_colour", ("background",), accept=accept)


@register_kind
def ask_corner_naming(scene: Scene, context: Context, rng: Random, want: str | None) -> SceneQuestion | None:
    """Ask what is in a corner: the reverse of `quadrant`. It is in the training data only, not in the test."""
    known = [(t.concept.name, q) for t in scene.things if (q := scene.find_quadrant(t.box))]
    if not known:
        return None
    name, place = rng.choice(known)
    text = rng.choice([f"What is in the {place} corner?", f"What is at the {place}?"])
    return SceneQuestion(text, name, "corner_naming", (f"name {name}",), (f"place {name}",))


@register_kind
def ask_multiple_choice(scene: Scene, context: Context, rng: Random, want: str | None) -> SceneQuestion | None:
    """Ask which of four concepts is in the image, by its letter."""
    letters = "ABCD"
    right = letters.index(want) if want else rng.randrange(4)
    near = set().union(*(load_library().list_near(t.concept.name) for t in scene.things))
    names = rng.sample([c for c in context.concepts if c not in near], 4)
    names[right] = rng.choice(scene.things).concept.name
    offer = " ".join(f"{letter}. {name}" for letter, name in zip(letters, names, strict=True))
    text = f"Which of these is in the picture? {offer} Answer with the letter."
    return SceneQuestion(text, letters[right], "multiple_choice", (f"name {names[right]}",), options=tuple(names))


@register_kind
def ask_reading(scene: Scene, context: Context, rng: Random, want: str | None) -> SceneQuestion | None:
    """Ask for the word in the image."""
    if not scene.words or want not in (None, scene.words[0].text):
        return None
    text = rng.choice(["What does the picture say?", "Which word is written here?", "Read the word."])
    return SceneQuestion(text, scene.words[0].text, "reading", ("word",))
