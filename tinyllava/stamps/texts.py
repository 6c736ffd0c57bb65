"""A scene in words, and conversations without an image: most of what the LLM of the package is pretrained on."""

from random import Random

from tinyllava.stamps.compose import QUADRANTS, Box, Scene, Thing
from tinyllava.stamps.library import load_library
from tinyllava.stamps.questions import Context, Turn


def write_caption(scene: Scene) -> str:
    """Write everything that can be asked about the scene in one line: number, background, each thing with its place."""
    if scene.words:
        word = scene.words[0].text
        return f"the word {' '.join(word)}, {word}, on a {scene.background} background."
    things = sorted(scene.things, key=lambda t: (QUADRANTS.index(q) if (q := scene.find_quadrant(t.box)) else 0, t.box))
    count = f"{len(things)} thing" if len(things) == 1 else f"{len(things)} things"
    return f"{count} on a {scene.background} background: {', '.join(_describe_thing(scene, t) for t in things)}."


def _describe_thing(scene: Scene, thing: Thing) -> str:
    """'a red balloon top left'."""
    corner = scene.find_quadrant(thing.box)
    return f"{_name_thing(thing)} {corner}" if corner else _name_thing(thing)


def _name_thing(thing: Thing) -> str:
    """'a red balloon', 'scissors'."""
    if not thing.tint:
        return thing.concept.phrase
    article = "" if thing.concept.noun != "count" else "an " if thing.tint[0] in "aeiou" else "a "
    return f"{article}{thing.tint} {thing.concept.name}"


def describe_in_words(scene: Scene, rng: Random) -> str:
    """Write the scene as a text for the place of its image: where each thing is, in any order, without counts."""
    facts = [f"{_name_thing(thing)} {_name_place(scene, thing.box)}" for thing in scene.things]
    facts += [f"the word {word.text}" for word in scene.words] + [f"{scene.background} background"]
    return f"{', '.join(rng.sample(facts, len(facts)))}."


def _name_place(scene: Scene, box: Box) -> str:
    """A ninth of the image: 'top left', 'middle', 'middle right'."""
    half = scene.size / 2
    row = "top" if box[3] <= half else "bottom" if box[1] >= half else "middle"
    column = "left" if box[2] <= half else "right" if box[0] >= half else ""
    return f"{row} {column}".strip()


def ask_spelling(context: Context, rng: Random) -> list[Turn]:
    """Return three questions about letters: how a word is spelled, or which word some letters spell."""
    turns = []
    for name in rng.sample([name for name in context.concepts if name.isalpha()], 3):
        letters = " ".join(name)
        turn = (f"How do you spell {name}?", letters) if rng.random() < 0.5 else (f"Which word is {letters}?", name)
        turns.append(turn)
    return turns


def ask_without_image(context: Context, rng: Random) -> list[Turn]:
    """Return two questions about what the names mean."""
    concepts = load_library().concepts
    classified = [name for name in context.concepts if concepts[name].kind]
    turns = []
    for name in rng.sample(classified, 2):
        concept = concepts[name]
        if rng.random() < 0.5:
            turns.append((f"What kind of thing is {concept.phrase}?", concept.kind))
            continue
        others = sorted({concepts[other].kind for other in classified} - {concept.kind})
        is_right = rng.random() < 0.5
        kind = concept.kind if is_right else rng.choice(others)
        if kind in ("food", "clothing"):  # mass nouns: no article
            question = f"Is {concept.phrase} {kind}?"
        else:
            question = f"Is {concept.phrase} {'an' if kind[0] in 'aeiou' else 'a'} {kind}?"
        turns.append((question, "yes" if is_right else "no"))
    return turns
