"""Questions about several things at once: 'Which of these are in the picture: cat, dog?' - 'cat yes, dog no.'

A short answer says one thing about one name. The answer to a roll call says one for each name, so a model learns more
from each image.
"""

from random import Random

from tinyllava.stamps.compose import QUADRANTS, Scene
from tinyllava.stamps.library import load_library
from tinyllava.stamps.questions import Context, Turn, find_relations

# How often each form of a roll call is chosen. If the scene does not fit a form, the question is about existence.
ROLLS = {"existence": 2, "counting": 1, "quadrant": 3, "spatial": 2, "colour": 1, "names": 1, "letters": 2}


def ask_roll_call(scene: Scene, context: Context, rng: Random, forms: dict[str, int] | None = None) -> Turn | None:
    """Return a question about several names and its answers in the same order, or None if the scene does not fit.

    Half of the answers repeat the names ('cat yes, dog no.'): the model has just written what it must look up. The
    other half do not ('yes, no.'): the model must first find the name in the question, as for any short answer.
    """
    present = list(dict.fromkeys(t.concept.name for t in scene.things))
    near = set().union(*(load_library().list_near(name) for name in present))
    absent = rng.sample([name for name in context.concepts if name not in near], rng.randint(1, 4))
    forms = forms or ROLLS
    form = rng.choices(list(forms), list(forms.values()))[0]
    if form in ("names", "letters"):
        return _ask_choices(present, absent, rng, letters=form == "letters")
    question, answers = _answer_form(form, scene, present, absent, rng)
    if not answers:
        return None
    names = rng.sample(list(answers), len(answers))
    if rng.random() < 0.5:
        return f"{question}: {', '.join(names)}? Answer in order.", f"{', '.join(answers[name] for name in names)}."
    return f"{question}: {', '.join(names)}?", f"{', '.join(f'{name} {answers[name]}' for name in names)}."


def _answer_form(
    form: str, scene: Scene, present: list[str], absent: list[str], rng: Random
) -> tuple[str, dict[str, str]]:
    """Return the question of a form, without its names, and the answer for each name that it can be asked about."""
    things = scene.list_unique_things()
    if form == "counting" and all(t.concept.countable for t in scene.things):
        counts = {name: str(sum(t.concept.name == name for t in scene.things)) for name in present + absent}
        return "How many of each are there", counts
    if form == "quadrant":
        corners = {t.concept.name: corner for t in things if (corner := scene.find_quadrant(t.box))}
        return "In which corner is each of these", corners
    if form == "spatial" and len(things) > 1:
        reference, sides = rng.choice(things), rng.choice([("left", "right"), ("above", "below")])
        name = reference.concept.name
        if sides[0] == "above":
            question = f"Is each of these above or below the {name}"
        else:
            question = f"Is each of these left of or right of the {name}"
        others = [t for t in things if t is not reference]
        return question, {t.concept.name: r for t in others for r in find_relations(t, reference) if r in sides}
    if form == "colour":
        return "What colour is each of these", {t.concept.name: t.tint for t in things if t.tint}
    existence = {name: "yes" if name in present else "no" for name in present + absent}
    return "Which of these are in the picture", existence


def _ask_choices(present: list[str], absent: list[str], rng: Random, letters: bool) -> Turn:
    """Ask which one to three of several names are in the image: 'cat, bus.'

    With `letters` the names are a multiple choice, answered with 'A, C.' or with 'A yes, B no, C yes.'
    """
    right = rng.sample(present, rng.randint(1, min(3, len(present))))
    names = rng.sample([*right, *absent], len(right) + len(absent))
    if not letters:
        offer, answer = ", ".join(names), ", ".join(name for name in names if name in right)
        return f"Which of these are in the picture: {offer}? Answer with the names.", f"{answer}."
    offered = dict(zip("ABCDEFG", names, strict=False))
    offer = " ".join(f"{letter}. {name}" for letter, name in offered.items())
    if rng.random() < 0.5:
        answer = ", ".join(f"{letter} {'yes' if name in right else 'no'}" for letter, name in offered.items())
        return f"Which of these are in the picture? {offer} Answer yes or no for each letter.", f"{answer}."
    answer = ", ".join(letter for letter, name in offered.items() if name in right)
    return f"Which of these are in the picture? {offer} Answer with the letters.", f"{answer}."


def ask_about_list(context: Context, rng: Random) -> Turn:
    """Return a list of names, or of names with corners, with a question about it that is answered with the names.

    This is the shortest text in which a model can look something up, with as many answers as names.
    """
    count = rng.randint(2, 6)
    names = rng.sample(context.concepts, count + rng.randint(1, 4))
    if rng.random() < 0.5:
        answers = {name: rng.choice(QUADRANTS) for name in names[:count]}
        listed = ", ".join(f"{name} {corner}" for name, corner in answers.items())
        question = "In which corner is each of these"
    else:
        answers = {name: "yes" if i < count else "no" for i, name in enumerate(names)}
        listed = ", ".join(names[:count])
        question = "Which of these are in the picture"
    names = rng.sample(list(answers), len(answers))
    answer = ", ".join(f"{name} {answers[name]}" for name in names)
    return f"{listed}.\n{question}: {', '.join(names)}?", f"{answer}."
