"""The records of a tier: which question is asked about which image, decided before a pixel is drawn.

Each record has a random generator of its own, seeded by tier, subset and number. So the size of one subset changes no
other subset, and no test image is a training image. For kinds whose answers could be unbalanced, the answer is drawn
before the scene.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from tinyllava.stamps import patches, words
from tinyllava.stamps.compose import BACKGROUNDS, QUADRANTS, Scene, compose_scene
from tinyllava.stamps.library import TINTS, load_library
from tinyllava.stamps.questions import QUESTION_KINDS, Context, SceneQuestion, Turn
from tinyllava.stamps.roll_calls import ask_about_list, ask_roll_call
from tinyllava.stamps.texts import ask_spelling, ask_without_image, describe_in_words, write_caption
from tinyllava.stamps.tiers import Tier, get_tier

# Share of images with one thing, in addition to those that have one by chance: a tower learns names from large things.
SINGLE = 0.4
TEXT_ONLY = 0.05  # share of instructions without an image
WRITTEN = 0.15  # share of images with a word to read
DESCRIBE = 0.08  # share of conversations that are a description
SPELL = 0.1  # share of texts that are about spelling
RASTER = 0.75  # share of the other texts that have a word for each patch; the rest has a list of what is in the image
INVENTED = 0.6  # share of the words to read that are invented
# In "questions", this share is about one thing and of one of these kinds; the rest is about several things.
ONE_THING = 0.4
ONE_THING_KINDS = ("existence", "counting", "quadrant", "spatial", "colour", "multiple_choice")
SUBSETS = ("captions", "instructions", "validation", "test", "lists", "questions", "texts", "words")


@dataclass(frozen=True)
class PlannedRecord:
    """A record as it will be written, and the scene of its image (None: text only)."""

    record: dict
    scene: Scene | None


def list_training_subsets(name: str) -> tuple[str, ...]:
    """Return the subsets of tier `name`, without its test."""
    return tuple(subset for subset in SUBSETS if subset != "test" and getattr(get_tier(name), subset))


def plan_records(tier: Tier, seed: int, subset: str, count: int) -> Iterator[PlannedRecord]:
    """Yield the `count` records of one subset; of the test, `count` for each category."""
    if subset == "test":
        yield from _plan_test(tier, seed, count)
        return
    for number in range(count):
        rng = Random(f"{tier.name}/{seed}/{subset}/{number}")
        scene, turns = _plan_conversation(tier, subset, rng)
        name = f"{subset}-{number:06d}"
        record = {"id": name} | ({"image": f"images/{name}.jpg"} if scene else {})
        record["conversations"] = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        yield PlannedRecord(record, scene)


def _plan_conversation(tier: Tier, subset: str, rng: Random) -> tuple[Scene | None, list[Turn]]:
    if subset == "captions":
        scene = sample_scene(tier, rng, single=SINGLE)
        return scene, [("<image>\nDescribe the picture.", write_caption(scene))]
    if subset == "lists":
        return None, [ask_about_list(_build_context(tier), rng)]
    if subset == "questions":
        return None, [_ask_about_words(tier, rng)]
    if subset == "texts":
        return None, _write_text(tier, rng)
    if subset == "words":
        scene = _sample_page(tier, rng)
        return scene, [words.ask_to_read(scene, rng)]
    if rng.random() < TEXT_ONLY:
        return None, ask_without_image(_build_context(tier), rng)
    return _ask_about_scene(tier, rng)


def _build_context(tier: Tier) -> Context:
    return Context(tier.concepts, tier.most)


def sample_scene(tier: Tier, rng: Random, single: float = 0.0, first: str | None = None) -> Scene:
    """Sample a scene of the tier: one or several things, often some of the same concept, on any background.

    `single` is the share of scenes that are made to have one thing, `first` the concept of the first thing.
    """
    count = 1 if rng.random() < single else rng.randint(1, tier.most)
    copies = rng.randint(2, count) if count > 1 and rng.random() < 0.35 else 1
    return compose_scene(
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


def sample_word(tier: Tier, rng: Random) -> Scene:
    """Sample a scene with one word for training: an invented word or a name of the tier.

    The names of held-out concepts are held out of reading as well.
    """
    known = _list_known_words(tier)
    text = words.invent_word(rng, known) if rng.random() < INVENTED else rng.choice(known)
    return words.compose_word_scene(rng, tier.size, tier.patterns, (text,), words.FONTS)


def _sample_page(tier: Tier, rng: Random) -> Scene:
    """Sample a scene with one to three invented words, which can only be read letter by letter."""
    known = _list_known_words(tier)
    texts = tuple(words.invent_wordlike(rng, known) for _ in range(rng.randint(1, 3)))
    return words.compose_word_scene(rng, tier.size, tier.patterns, texts, words.FONTS, count=len(texts))


def _list_known_words(tier: Tier) -> tuple[str, ...]:
    """Return the training words that are names of the tier."""
    concepts = set(tier.concepts)
    return tuple(word for word in words.list_words(words.TRAIN) if word in concepts)


def _ask_about_scene(tier: Tier, rng: Random) -> tuple[Scene, list[Turn]]:
    """Return a scene and several questions about it, none of which can be answered from the turns before it."""
    context = _build_context(tier)
    scene, kinds = _sample_scene_and_kinds(tier, rng)
    # The order of the conditions matters: a random number is drawn only where the ones before it hold.
    has_roll_call = scene.things and tier.rolls and rng.random() < tier.rolls
    if has_roll_call and (turn := ask_roll_call(scene, context, rng, tier.forms)):
        return scene, [(f"<image>\n{turn[0]}", turn[1])]
    questions = _ask_existence_of_each(scene, context, rng) if rng.random() < tier.existence else []
    revealed = {fact for question in questions for fact in question.asks}
    for kind in kinds:
        if len(questions) < tier.turns:
            question = QUESTION_KINDS[kind](scene, context, rng, _choose_count(kind, tier, rng))
            if question and not revealed & set(question.asks):
                revealed.update(question.asks, question.tells)
                questions.append(question)
    turns = [(question.text, question.answer) for question in questions]
    if scene.things and (rng.random() < DESCRIBE or not turns):
        turns = [(rng.choice(["Describe the picture.", "What do you see?"]), write_caption(scene))]
    (text, answer), *others = turns
    return scene, [(f"<image>\n{text}", answer), *others]


def _sample_scene_and_kinds(tier: Tier, rng: Random) -> tuple[Scene, list[str]]:
    """Sample a scene, and the kinds of questions to try in this order."""
    if "reading" in tier.kinds and rng.random() < WRITTEN:
        return sample_word(tier, rng), ["reading", "background_colour"]
    scene = sample_scene(tier, rng, single=SINGLE / 4)
    # A kind that is asked 1.5 times is in the list once, and twice in half of the conversations.
    kinds = [k for k, times in tier.kinds.items() if k != "reading" for _ in range(int(times + rng.random()))]
    rng.shuffle(kinds)
    return scene, kinds


def _choose_count(kind: str, tier: Tier, rng: Random) -> str | None:
    """Choose the answer to a counting question, larger numbers more often; None for all other kinds.

    Larger numbers fit fewer scenes: nearly every image holds one of something, and few hold three.
    """
    counts = range(1, tier.most + 1)
    return str(rng.choices(counts, counts)[0]) if kind == "counting" else None


def _ask_existence_of_each(scene: Scene, context: Context, rng: Random) -> list[SceneQuestion]:
    """Ask as many existence questions as there are concepts, before anything else is asked.

    A concept that an earlier question names would be a hint. And without this rule the later answers would mostly be
    no, because few concepts of the image would be left to ask about.
    """
    questions, revealed = [], set()
    for _ in {t.concept.name for t in scene.things}:
        want = rng.choice(["yes", "no"])
        question = None
        while question is None or revealed & set(question.asks):
            question = QUESTION_KINDS["existence"](scene, context, rng, want)
        revealed.update(question.asks)
        questions.append(question)
    return questions


def _ask_about_words(tier: Tier, rng: Random) -> Turn:
    """Describe a scene in words, with a question about one thing or about several (the LLM's second stage)."""
    turn = None
    while turn is None:
        scene = sample_scene(tier, rng)
        if rng.random() >= ONE_THING:
            turn = ask_roll_call(scene, _build_context(tier), rng) if len(scene.things) > 1 else None
        elif question := QUESTION_KINDS[rng.choice(ONE_THING_KINDS)](scene, _build_context(tier), rng, None):
            turn = question.text, question.answer
    return f"{describe_in_words(scene, rng)}\n{turn[0]}", turn[1]


def _write_text(tier: Tier, rng: Random) -> list[Turn]:
    """Write a conversation with words in the place of an image, or without an image (the LLM's third stage).

    Most of them end with a description: copying many names teaches the model to look one up.
    """
    if rng.random() < TEXT_ONLY:
        return ask_without_image(_build_context(tier), rng)
    if rng.random() < SPELL:
        return ask_spelling(_build_context(tier), rng)
    scene, turns = _ask_about_scene(tier, rng)
    if scene.things and len(turns) < tier.turns:
        turns.append(("Describe the picture.", write_caption(scene)))
    shown = patches.write_raster(scene) if rng.random() < RASTER else describe_in_words(scene, rng)
    (text, answer), *others = turns
    return [(text.replace("<image>", shown), answer), *others]


def list_answers(tier: Tier) -> dict[str, tuple[str, ...]]:
    """Return the categories of the tier's test, and the answers that each asks for in turn."""
    concepts = load_library().concepts
    # A kind with one concept would make a category question a naming question.
    kinds = tuple(
        kind
        for kind in sorted({c.kind for c in concepts.values() if c.kind})
        if sum(concepts[name].kind == kind for name in tier.concepts) >= 2
    )
    answers = {
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
        answers["multiple_choice"] = ("A", "B", "C", "D")
    if "reading" in tier.kinds:
        answers["reading"] = words.list_words(words.HELD_OUT)
    if tier.held_out:
        answers["new_concepts"] = tuple(name for name in tier.held_out if concepts[name].kind in kinds)
    return answers


def _plan_test(tier: Tier, seed: int, count: int) -> Iterator[PlannedRecord]:
    """Yield `count` questions per category, each about an image of its own. Answers come in turn, so they balance."""
    for category, choices in list_answers(tier).items():
        order = Random(f"{tier.name}/{seed}/test/{category}").sample(choices, len(choices))
        for number in range(count):
            rng = Random(f"{tier.name}/{seed}/test/{category}/{number}")
            want = order[number % len(order)]
            question = None
            while question is None:
                scene, question = _ask_for_answer(tier, rng, category, want)
            name = f"test-{category}-{number:04d}"
            record = {"question_id": name, "image": f"images/{name}.jpg", "text": question.text}
            record |= {"answer": question.answer, "category": category}
            record |= {"accept": list(question.accept)} if question.accept else {}
            record |= {"options": list(question.options)} if question.options else {}
            yield PlannedRecord(record, scene)


def _ask_for_answer(tier: Tier, rng: Random, category: str, want: str) -> tuple[Scene, SceneQuestion | None]:
    """Sample a scene and ask the question of a category whose answer is `want`; None if the scene does not fit."""
    context = _build_context(tier)
    if category == "reading":
        fonts = words.HELD_OUT_FONTS if rng.random() < 0.5 else words.FONTS
        scene = words.compose_word_scene(rng, tier.size, tier.patterns, (want,), fonts)
    elif category == "new_concepts":  # `want` is a held-out concept here, and the question asks for its kind
        scene = sample_scene(tier, rng, single=1.0, first=want)
        return scene, QUESTION_KINDS["category"](scene, context, rng, None)
    elif category == "naming":
        scene = sample_scene(tier, rng, single=1.0, first=want)
    else:
        scene = sample_scene(tier, rng, single=1.0 if category == "category" else 0.0)
    return scene, QUESTION_KINDS[category](scene, context, rng, want)
