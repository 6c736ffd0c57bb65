"""What is asked about which picture: every record of a tier, decided before a pixel is drawn.

Each record has a random generator of its own, seeded by tier, part and number: one part's size changes no other part,
and test pictures are never training pictures. Answers are drawn before scenes wherever a kind could lean to one answer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from tinyllava.data.stamps import patches, words
from tinyllava.data.stamps.compose import BACKGROUNDS, QUADRANTS, Scene, compose
from tinyllava.data.stamps.library import TINTS, library
from tinyllava.data.stamps.questions import (
    KINDS,
    Context,
    Question,
    caption,
    chat,
    in_words,
    looked_up,
    roll_call,
    spelling,
)
from tinyllava.data.stamps.tiers import Tier, tier

SINGLE = 0.4  # share of pictures with one thing, beyond its even share: a tower learns names from large things first
TEXT_ONLY = 0.05  # share of instructions without a picture
WRITTEN = 0.15  # share of pictures with a word to read
DESCRIBE = 0.08  # share of conversations that are a description
SPELL = 0.1  # share of texts that are about spelling
RASTER = (
    0.75  # share of the others that have a word for each patch where the picture will be, not a list of what is there
)
INVENTED = 0.6  # share of the words to read that are no words
# What is asked about one thing in a list, in a share ONE of them.
SHORT, ONE = ("existence", "counting", "quadrant", "spatial", "colour", "multiple_choice"), 0.4
PARTS = ("captions", "instructions", "validation", "test", "lists", "questions", "texts", "words")


@dataclass(frozen=True)
class Planned:
    """A record as it will be written, and the scene of its picture (None: text only)."""

    record: dict
    scene: Scene | None


def trained_parts(name: str) -> tuple[str, ...]:
    """The parts that tier `name` has, but for its test."""
    return tuple(part for part in PARTS if part != "test" and getattr(tier(name), part))


def plan(tier: Tier, seed: int, part: str, count: int) -> Iterator[Planned]:
    """The records of one part, `count` of them (test: `count` a category)."""
    if part == "test":
        yield from _test(tier, seed, count)
        return
    for number in range(count):
        rng = Random(f"{tier.name}/{seed}/{part}/{number}")
        name = f"{part}-{number:06d}"
        image = f"images/{name}.jpg"
        if part == "captions":
            scene = sample(tier, rng, single=SINGLE)
            turns = [("<image>\nDescribe the picture.", caption(scene))]
        elif part == "lists":
            scene, turns = None, [looked_up(_context(tier), rng)]
        elif part == "questions":
            scene, turns = None, _list(tier, rng)
        elif part == "texts":
            scene, turns = None, _written(tier, rng)
        elif part == "words":
            scene = _page(tier, rng)
            turns = [words.read(scene, rng)]
        elif rng.random() < TEXT_ONLY:
            scene, turns = None, chat(_context(tier), rng)
        else:
            scene, turns = _conversation(tier, rng)
        record = {"id": name} | ({"image": image} if scene else {})
        record["conversations"] = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        yield Planned(record, scene)


def _context(tier: Tier) -> Context:
    return Context(tier.concepts, tier.most)


def sample(tier: Tier, rng: Random, single: float = 0.0, first: str | None = None) -> Scene:
    """Any scene of the tier: one thing or several, often some of the same kind, on any background."""
    count = 1 if rng.random() < single else rng.randint(1, tier.most)
    copies = rng.randint(2, count) if count > 1 and rng.random() < 0.35 else 1
    return compose(
        rng,
        tier.size,
        tier.concepts,
        count,
        patterns=tier.patterns,
        drawings=tier.drawings,
        flips=tier.flips,
        fill=tier.fill,
        copies=copies,
        first=first,
        placed=rng.random() < 0.5,
        jitter=tier.jitter,
    )


def _conversation(tier: Tier, rng: Random) -> tuple[Scene, list[tuple[str, str]]]:
    """A scene and several questions about it, none of which could be answered from those before it."""
    context = _context(tier)
    if "reading" in tier.kinds and rng.random() < WRITTEN:
        scene = word(tier, rng)
        kinds = ["reading", "background_colour"]
    else:
        scene = sample(tier, rng, single=SINGLE / 4)
        kinds = [k for k, w in tier.kinds.items() if k != "reading" for _ in range(int(w + rng.random()))]
        rng.shuffle(kinds)
    if (
        scene.things
        and tier.rolls
        and rng.random() < tier.rolls
        and (turn := roll_call(scene, context, rng, tier.forms))
    ):
        return scene, [(f"<image>\n{turn[0]}", turn[1])]
    found = _existence(scene, context, rng) if rng.random() < tier.existence else []
    told = {fact for question in found for fact in question.asks}
    for kind in kinds:
        if len(found) < tier.turns:
            question = KINDS[kind](scene, context, rng, _wanted(kind, tier, rng))
            if question and not told & set(question.asks):
                told.update(question.asks, question.tells)
                found.append(question)
    turns = [(q.text, q.answer) for q in found]
    if scene.things and (rng.random() < DESCRIBE or not turns):
        turns = [(rng.choice(["Describe the picture.", "What do you see?"]), caption(scene))]
    return scene, [(f"<image>\n{text}" if i == 0 else text, answer) for i, (text, answer) in enumerate(turns)]


def word(tier: Tier, rng: Random) -> Scene:
    """A word to read in training: a name of the tier, so that the names of held-out concepts are not even read."""
    known = _known(tier)
    text = words.invented(rng, known) if rng.random() < INVENTED else rng.choice(known)
    return words.scene(rng, tier.size, tier.patterns, (text,), words.FONTS)


def _page(tier: Tier, rng: Random) -> Scene:
    """One to three invented words, to be read letter by letter."""
    known = _known(tier)
    texts = tuple(words.wordlike(rng, known) for _ in range(rng.randint(1, 3)))
    return words.scene(rng, tier.size, tier.patterns, texts, words.FONTS, count=len(texts))


def _known(tier: Tier) -> tuple[str, ...]:
    """The words of training that are names of the tier."""
    concepts = set(tier.concepts)
    return tuple(word for word in words.split(words.TRAIN) if word in concepts)


def _list(tier: Tier, rng: Random) -> list[tuple[str, str]]:
    """What a language model learns second: questions about one thing in a longer list, or about several."""
    turn = None
    while turn is None:
        scene = sample(tier, rng)
        if rng.random() >= ONE:
            turn = roll_call(scene, _context(tier), rng) if len(scene.things) > 1 else None
        elif question := KINDS[rng.choice(SHORT)](scene, _context(tier), rng, None):
            turn = question.text, question.answer
    return [(f"{in_words(scene, rng)}\n{turn[0]}", turn[1])]


def _written(tier: Tier, rng: Random) -> list[tuple[str, str]]:
    """What a language model learns before it sees: a conversation with words where the picture will be, or none.

    It mostly ends with a description: copying many names is what teaches it to look one up.
    """
    if rng.random() < TEXT_ONLY:
        return chat(_context(tier), rng)
    if rng.random() < SPELL:
        return spelling(_context(tier), rng)
    scene, turns = _conversation(tier, rng)
    if scene.things and len(turns) < tier.turns:
        turns.append(("Describe the picture.", caption(scene)))
    seen = patches.raster(scene) if rng.random() < RASTER else in_words(scene, rng)
    (text, answer), *others = turns
    return [(text.replace("<image>", seen), answer), *others]


def _wanted(kind: str, tier: Tier, rng: Random) -> str | None:
    """A count is wanted the more often the rarer it is: nearly every picture holds one of something, few hold three."""
    counts = range(1, tier.most + 1)
    return str(rng.choices(counts, counts)[0]) if kind == "counting" else None


def _existence(scene: Scene, context: Context, rng: Random) -> list[Question]:
    """One existence question for each concept that is there, before anything else is asked: a concept named earlier in
    the conversation would be a hint, and running out of things to say yes to would tilt the rest to no."""
    found, told = [], set()
    for _ in {t.concept.name for t in scene.things}:
        want = rng.choice(["yes", "no"])
        question = None
        while question is None or told & set(question.asks):
            question = KINDS["existence"](scene, context, rng, want)
        told.update(question.asks)
        found.append(question)
    return found


def answers(tier: Tier) -> dict[str, tuple[str, ...]]:
    """The categories of the tier's test and the answers that each asks for in turn."""
    concepts = library().concepts
    kinds = tuple(
        k
        for k in sorted({c.kind for c in concepts.values() if c.kind})
        if sum(concepts[c].kind == k for c in tier.concepts) >= 2
    )
    found = {
        "existence": ("yes", "no"),
        "counting": tuple(str(n) for n in range(1, tier.most + 1)),
        "spatial": ("left", "right", "above", "below"),
        "quadrant": QUADRANTS,
        "colour": tuple(TINTS),
        "background_colour": tuple(BACKGROUNDS),
        "naming": tier.concepts,
        "category": kinds,
    }
    if "multiple_choice" in tier.kinds:
        found["multiple_choice"] = ("A", "B", "C", "D")
    if "reading" in tier.kinds:
        found["reading"] = words.split(words.HELD_OUT)
    if tier.held_out:
        found["new_concepts"] = tuple(c for c in tier.held_out if concepts[c].kind in kinds)
    return found


def _test(tier: Tier, seed: int, count: int) -> Iterator[Planned]:
    """`count` questions a category, each about a picture of its own, the answers in turn and so in equal numbers."""
    for category, choices in answers(tier).items():
        order = Random(f"{tier.name}/{seed}/test/{category}").sample(choices, len(choices))
        for number in range(count):
            rng = Random(f"{tier.name}/{seed}/test/{category}/{number}")
            want, question = order[number % len(order)], None
            while question is None:
                scene, question = _asked(tier, rng, category, want)
            name = f"test-{category}-{number:04d}"
            record = {"question_id": name, "image": f"images/{name}.jpg", "text": question.text}
            record |= {"answer": question.answer, "category": category}
            record |= {"accept": list(question.accept)} if question.accept else {}
            record |= {"options": list(question.options)} if question.options else {}
            yield Planned(record, scene)


def _asked(tier: Tier, rng: Random, category: str, want: str) -> tuple[Scene, Question | None]:
    context = _context(tier)
    if category == "reading":
        fonts = words.HELD_OUT_FONTS if rng.random() < 0.5 else words.FONTS
        scene = words.scene(rng, tier.size, tier.patterns, (want,), fonts)
    elif category == "new_concepts":
        scene = sample(tier, rng, single=1.0, first=want)
        return scene, KINDS["category"](scene, context, rng, None)
    elif category == "naming":
        scene = sample(tier, rng, single=1.0, first=want)
    else:
        scene = sample(tier, rng, single=1.0 if category == "category" else 0.0)
    return scene, KINDS[category](scene, context, rng, want)
