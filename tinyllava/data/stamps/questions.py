"""Questions with certain answers about a scene, one function a kind.

A kind is called with the scene and, where the answer was chosen first (the balanced test), with that answer; it gives
None where the scene does not fit. Every answer is a word or two, so that exact match scores it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tinyllava.data.stamps.compose import QUADRANTS, Box, Scene, Thing
from tinyllava.data.stamps.library import library


@dataclass(frozen=True)
class Question:
    """One question and its answer, what else is right (`accept`) and what is offered (`options`).

    `asks` are the facts one must see in the picture to answer; whoever has heard the question and its answer knows
    those and what it `tells` besides. A conversation asks for no fact that was told before: it could be answered blind.
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
def naming(scene: Scene, context: Context, rng: Random, want: str | None) -> Question | None:
    if len(scene.things) != 1 or want not in (None, scene.things[0].concept.name):
        return None
    concept = scene.things[0].concept
    text = rng.choice(["What is in the picture?", "What is this?", "What does the picture show?"])
    accept = (concept.phrase,) if concept.noun == "count" else ()
    return Question(text, concept.name, "naming", (f"name {concept.name}",), accept=accept)


@kind
def category(scene: Scene, context: Context, rng: Random, want: str | None) -> Question | None:
    answer = scene.things[0].concept.kind if len(scene.things) == 1 else None
    if answer is None or want not in (None, answer):
        return None
    text = rng.choice(["What kind of thing is in the picture?", "What kind of thing is this?"])
    return Question(text, answer, "category", (f"name {scene.things[0].concept.name}", "category"))


@kind
def existence(scene: Scene, context: Context, rng: Random, want: str | None) -> Question | None:
    want = want or rng.choice(["yes", "no"])
    if want == "yes":
        concept = rng.choice(scene.things).concept
    else:
        near = set().union(*(library().near(t.concept.name) for t in scene.things))
        concept = library().concepts[rng.choice([c for c in context.concepts if c not in near])]
    forms = [f"Can you see {concept.phrase} in the picture?", f"Does the picture show {concept.phrase}?"]
    if concept.noun == "count":
        forms.append(f"Is there {concept.phrase} in the picture?")
    return Question(rng.choice(forms), want, "existence", (f"name {concept.name}",))


@kind
def counting(scene: Scene, context: Context, rng: Random, want: str | None) -> Question | None:
    if not all(t.concept.countable for t in scene.things):
        return None
    names = [t.concept.name for t in scene.things]
    name = rng.choice([*dict.fromkeys(names), None])
    answer = str(names.count(name) if name else len(names))
    if want not in (None, answer):
        return None
    noun = library().concepts[name].plural if name else "things"
    text = rng.choice([f"How many {noun} are in the picture?", f"How many {noun} are there?", f"Count the {noun}."])
    return Question(text, answer, "counting", ("count",), (f"name {name}",) if name else ())


@kind
def quadrant(scene: Scene, context: Context, rng: Random, want: str | None) -> Question | None:
    known = [(t.concept.name, q) for t in scene.unique() if (q := scene.quadrant(t.box)) and want in (None, q)]
    if not known:
        return None
    name, answer = rng.choice(known)
    text = rng.choice([f"In which corner is the {name}?", f"Where is the {name}?", f"Which corner is the {name} in?"])
    return Question(text, answer, "quadrant", (f"place {name}",), (f"name {name}", "count"))


def relation(one: Thing, other: Thing) -> list[str]:
    """Where `one` is, seen from `other`: only directions in which the boxes do not overlap."""
    a, b = one.box, other.box
    found = ["left"] if a[2] <= b[0] else ["right"] if a[0] >= b[2] else []
    return found + (["above"] if a[3] <= b[1] else ["below"] if a[1] >= b[3] else [])


@kind
def spatial(scene: Scene, context: Context, rng: Random, want: str | None) -> Question | None:
    things = scene.unique()
    pairs = [(a, b, r) for a in things for b in things if a is not b for r in relation(a, b) if want in (None, r)]
    if not pairs:
        return None
    one, other, answer = rng.choice(pairs)
    a, b = one.concept.name, other.concept.name
    if answer in ("left", "right"):
        forms = [f"Is the {a} left or right of the {b}?", f"Is the {a} to the left or right of the {b}?"]
    else:
        forms = [f"Is the {a} above or below the {b}?", f"Is the {a} over or under the {b}, above or below?"]
    return Question(
        rng.choice(forms), answer, "spatial", (f"place {a}", f"place {b}"), (f"name {a}", f"name {b}", "count")
    )


@kind
def colour(scene: Scene, context: Context, rng: Random, want: str | None) -> Question | None:
    known = [t for t in scene.unique() if t.tint and want in (None, t.tint)]
    if not known:
        return None
    thing = rng.choice(known)
    name = thing.concept.name
    text = rng.choice([f"What colour is the {name}?", f"Which colour does the {name} have?"])
    return Question(text, thing.tint, "colour", (f"colour {name}",), (f"name {name}", "count"))


@kind
def background_colour(scene: Scene, context: Context, rng: Random, want: str | None) -> Question | None:
    if want not in (None, scene.background):
        return None
    text = rng.choice(["What colour is the background?", "Which colour does the background have?"])
    accept = ("grey",) if scene.background == "gray" else ()
    return Question(text, scene.background, "background_colour", ("background",), accept=accept)


@kind
def corner_naming(scene: Scene, context: Context, rng: Random, want: str | None) -> Question | None:
    """Trained, not tested: the other way round of `quadrant`."""
    known = [(t.concept.name, q) for t in scene.things if (q := scene.quadrant(t.box))]
    if not known:
        return None
    name, place = rng.choice(known)
    text = rng.choice([f"What is in the {place} corner?", f"What is at the {place}?"])
    return Question(text, name, "corner_naming", (f"name {name}",), (f"place {name}",))


@kind
def multiple_choice(scene: Scene, context: Context, rng: Random, want: str | None) -> Question | None:
    letters = "ABCD"
    right = letters.index(want) if want else rng.randrange(4)
    near = set().union(*(library().near(t.concept.name) for t in scene.things))
    names = rng.sample([c for c in context.concepts if c not in near], 4)
    names[right] = rng.choice(scene.things).concept.name
    offer = " ".join(f"{letter}. {name}" for letter, name in zip(letters, names, strict=True))
    text = f"Which of these is in the picture? {offer} Answer with the letter."
    return Question(text, letters[right], "multiple_choice", (f"name {names[right]}",), options=tuple(names))


@kind
def reading(scene: Scene, context: Context, rng: Random, want: str | None) -> Question | None:
    if not scene.words or want not in (None, scene.words[0].text):
        return None
    text = rng.choice(["What does the picture say?", "Which word is written here?", "Read the word."])
    return Question(text, scene.words[0].text, "reading", ("word",))


# How often each form of a roll call is chosen; where the scene does not fit one, existence is asked.
ROLLS = {"existence": 2, "counting": 1, "quadrant": 3, "spatial": 2, "colour": 1, "names": 1, "letters": 2}


def roll_call(
    scene: Scene, context: Context, rng: Random, forms: dict[str, int] | None = None
) -> tuple[str, str] | None:
    """One question about each of several things, answered in the order in which they were named: 'cat yes, dog no.',
    or where it says so without the names: 'yes, no.'

    A short answer says one bit about one thing; this says as many as there are names, and each of them only to who
    looks up its name in the picture. With the names (half the time) the model has just said what it looks up; without
    them it has to find that in the question first, as for any other answer.
    """
    present = list(dict.fromkeys(t.concept.name for t in scene.things))
    near = set().union(*(library().near(name) for name in present))
    absent = rng.sample([name for name in context.concepts if name not in near], rng.randint(1, 4))
    known = scene.unique()
    forms = forms or ROLLS
    form = rng.choices(list(forms), list(forms.values()))[0]
    if form in ("names", "letters"):
        return _choices(present, absent, rng, letters=form == "letters")
    if form == "counting" and all(t.concept.countable for t in scene.things):
        asked = "How many of each are there"
        found = {name: str(sum(t.concept.name == name for t in scene.things)) for name in present + absent}
    elif form == "quadrant":
        asked = "In which corner is each of these"
        found = {t.concept.name: place for t in known if (place := scene.quadrant(t.box))}
    elif form == "spatial" and len(known) > 1:
        other, sides = rng.choice(known), rng.choice([("left", "right"), ("above", "below")])
        asked = f"Is each of these {sides[0]} {'or' if sides[0] == 'above' else 'of or'} {sides[1]}"
        asked += f"{'' if sides[0] == 'above' else ' of'} the {other.concept.name}"
        found = {t.concept.name: r for t in known if t is not other for r in relation(t, other) if r in sides}
    elif form == "colour":
        asked = "What colour is each of these"
        found = {t.concept.name: t.tint for t in known if t.tint}
    else:
        asked = "Which of these are in the picture"
        found = {name: "yes" if name in present else "no" for name in present + absent}
    if not found:
        return None
    names = rng.sample(list(found), len(found))
    if rng.random() < 0.5:
        return f"{asked}: {', '.join(names)}? Answer in order.", f"{', '.join(found[name] for name in names)}."
    return f"{asked}: {', '.join(names)}?", f"{', '.join(f'{name} {found[name]}' for name in names)}."


def _choices(present: list[str], absent: list[str], rng: Random, letters: bool) -> tuple[str, str]:
    """Which of several are there, one to three of them: 'cat, bus.' With letters as in a multiple choice, 'A, C.', or
    of each letter 'A yes, B no, C yes.'"""
    right = rng.sample(present, rng.randint(1, min(3, len(present))))
    names = rng.sample([*right, *absent], len(right) + len(absent))
    if not letters:
        offer, said = ", ".join(names), ", ".join(name for name in names if name in right)
        return f"Which of these are in the picture: {offer}? Answer with the names.", f"{said}."
    offered = dict(zip("ABCDEFG", names, strict=False))
    offer = " ".join(f"{letter}. {name}" for letter, name in offered.items())
    if rng.random() < 0.5:
        said = ", ".join(f"{letter} {'yes' if name in right else 'no'}" for letter, name in offered.items())
        return f"Which of these are in the picture? {offer} Answer yes or no for each letter.", f"{said}."
    said = ", ".join(letter for letter, name in offered.items() if name in right)
    return f"Which of these are in the picture? {offer} Answer with the letters.", f"{said}."


def caption(scene: Scene) -> str:
    """Everything that can be asked about the scene in one line: number, background, each thing with its place."""
    if scene.words:
        word = scene.words[0].text
        return f"the word {' '.join(word)}, {word}, on a {scene.background} background."
    things = sorted(scene.things, key=lambda t: (QUADRANTS.index(q) if (q := scene.quadrant(t.box)) else 0, t.box))
    count = f"{len(things)} thing{'s' * (len(things) != 1)}"
    return f"{count} on a {scene.background} background: {', '.join(_described(scene, t) for t in things)}."


def _described(scene: Scene, thing: Thing) -> str:
    """'a red balloon top left'."""
    place = scene.quadrant(thing.box)
    return f"{_named(thing)} {place}" if place else _named(thing)


def _named(thing: Thing) -> str:
    """'a red balloon', 'scissors'."""
    if not thing.tint:
        return thing.concept.phrase
    article = "" if thing.concept.noun != "count" else "an " if thing.tint[0] in "aeiou" else "a "
    return f"{article}{thing.tint} {thing.concept.name}"


def in_words(scene: Scene, rng: Random) -> str:
    """The scene as a text that can stand where its picture would: what is where, in any order, nothing counted."""
    found = [f"{_named(thing)} {_place(scene, thing.box)}" for thing in scene.things]
    found += [f"the word {word.text}" for word in scene.words] + [f"{scene.background} background"]
    return f"{', '.join(rng.sample(found, len(found)))}."


def _place(scene: Scene, box: Box) -> str:
    """A ninth of the picture: 'top left', 'middle', 'middle right'."""
    half = scene.size / 2
    row = "top" if box[3] <= half else "bottom" if box[1] >= half else "middle"
    column = "left" if box[2] <= half else "right" if box[0] >= half else ""
    return f"{row} {column}".strip()


def looked_up(context: Context, rng: Random) -> tuple[str, str]:
    """A question about a list, of names or of names with corners, answered with the names: the shortest text in which
    something can be looked up, with as many answers as names."""
    count = rng.randint(2, 6)
    names = rng.sample(context.concepts, count + rng.randint(1, 4))
    if rng.random() < 0.5:
        corner = {name: rng.choice(QUADRANTS) for name in names[:count]}
        listed = ", ".join(f"{name} {place}" for name, place in corner.items())
        asked, found = "In which corner is each of these", corner
    else:
        listed, asked = ", ".join(names[:count]), "Which of these are in the picture"
        found = {name: "yes" if i < count else "no" for i, name in enumerate(names)}
    names = rng.sample(list(found), len(found))
    return f"{listed}.\n{asked}: {', '.join(names)}?", f"{', '.join(f'{name} {found[name]}' for name in names)}."


def spelling(context: Context, rng: Random) -> list[tuple[str, str]]:
    """Three questions about letters, both ways."""
    turns = []
    for name in rng.sample([name for name in context.concepts if name.isalpha()], 3):
        letters = " ".join(name)
        turn = (f"How do you spell {name}?", letters) if rng.random() < 0.5 else (f"Which word is {letters}?", name)
        turns.append(turn)
    return turns


def chat(context: Context, rng: Random) -> list[tuple[str, str]]:
    """Two questions without a picture, about what the names mean."""
    sure = [c for c in context.concepts if library().concepts[c].kind]
    turns = []
    for name in rng.sample(sure, 2):
        concept = library().concepts[name]
        right, say = concept.kind, concept.phrase
        if rng.random() < 0.5:
            turns.append((f"What kind of thing is {say}?", right))
        else:
            others = sorted({library().concepts[c].kind for c in sure} - {right})
            yes = rng.random() < 0.5
            other = right if yes else rng.choice(others)
            form = "Is {} food?" if other == "food" else f"Is {{}} {'an' if other[0] in 'aeiou' else 'a'} {other}?"
            turns.append((form.format(say) if other != "clothing" else f"Is {say} clothing?", "yes" if yes else "no"))
    return turns
