"""The three sizes of the dataset, and two more for what the package brings: which concepts, how many, how full.

What is held out of training is held out of every tier, so that a tower trained on `full` may be tested on `small`.
"""

from dataclasses import dataclass, replace

from tinyllava.data.stamps.library import library

TINY = """
cat elephant frog penguin butterfly ladybug banana strawberry carrot hamburger watermelon pineapple car
bicycle sailboat airplane tree cactus sunflower balloon umbrella cap teapot soccer_ball
"""
SMALL = """
ant bat bear bee chick crocodile deer dog dolphin duck fish flamingo horse koala mouse octopus pig rabbit
snake tiger apple bread cake cheese cookie corn grapes hot_dog ice_cream_cone lemon mushroom orange peach
pizza popcorn sushi tomato bus helmet motorcycle rocket tractor train truck christmas_tree rose maple_leaf
pine_tree boot crown dress glasses high_heel jeans shirt sneaker guitar drum trumpet piano_keyboard violin
castle house tower axe hammer shovel scissors backpack bucket candle chair clapper_board gift key light_bulb
moon rainbow snowman star teddy_bear telephone television
"""
HELD_OUT_SMALL = """
fox giraffe zebra crab owl turtle broccoli donut pretzel taco helicopter ambulance scooter palm_tree tulip
scarf top_hat saxophone saw wrench
"""
HELD_OUT_FULL = """
kangaroo snail hedgehog panda parrot camel shark gorilla lobster swan spider avocado kiwi cupcake waffle
eggplant cherries bell_pepper tram canoe skateboard hibiscus clover kimono sandal accordion banjo mosque
hospital screwdriver
"""


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in text.split())


@dataclass(frozen=True)
class Tier:
    """What one size of the dataset holds. Numbers of pictures are per part; `test` is questions per category."""

    name: str
    concepts: tuple[str, ...]
    held_out: tuple[str, ...]
    size: int  # pixels a side
    most: int  # things in one picture
    drawings: int | None  # of each concept, the first so many
    flips: bool  # mirror drawings at random
    fill: float  # how much of its quarter of the picture a thing takes at least
    patterns: tuple[str, ...]
    captions: int
    instructions: int
    validation: int
    test: int
    turns: int  # questions in a conversation, at most
    kinds: dict[str, float]  # kind of question -> how often a conversation tries to ask one
    existence: float = 0.5  # share of conversations that begin with existence questions
    rolls: float = 0.0  # share of conversations that ask the same about several things
    forms: dict[str, int] | None = None  # how often in which form (None: questions.ROLLS)
    lists: int = 0  # lists of what is in a picture, each with one question about several things, answered by name
    questions: int = 0  # such lists with questions of all sorts
    texts: int = 0  # conversations about a picture in words
    words: int = 0  # pictures of one to three invented words
    jitter: bool = False  # drawings in colours a little off their own


ASKED = {
    "naming": 1.0,
    "category": 0.5,
    "counting": 3.0,
    "quadrant": 2.0,
    "spatial": 2.0,
    "colour": 1.0,
    "background_colour": 0.25,
    "corner_naming": 1.5,
}


def tier(name: str) -> Tier:
    """The tier of that name: tiny, small, full, or one that holds what `full` trains on and has no test: pretrain for
    parts, reading for words."""
    if name == "tiny":
        return Tier(
            "tiny",
            _names(TINY),
            held_out=(),
            size=64,
            most=3,
            # One drawing, as it is: a tower from random weights learns the names in two thirds of the steps that two
            # drawings and their mirror images take.
            drawings=1,
            flips=False,
            fill=0.85,
            patterns=("plain", "gradient"),
            captions=14000,
            instructions=20000,
            validation=300,
            test=160,
            turns=8,
            kinds=ASKED,
        )
    patterns = ("plain", "gradient", "stripes", "dots")
    small = Tier(
        "small",
        _names(TINY) + _names(SMALL),
        held_out=_names(HELD_OUT_SMALL),
        size=96,
        most=4,
        drawings=None,
        flips=True,
        fill=0.85,
        patterns=patterns,
        captions=6000,
        instructions=18000,
        validation=500,
        test=200,
        turns=8,
        # More of what 1,000 steps leave behind, less of what the LLM of the package has read about.
        kinds={
            **ASKED,
            "multiple_choice": 1.0,
            "category": 4.0,
            "background_colour": 1.0,
            "quadrant": 1.0,
            "naming": 0.5,
        },
        existence=0.25,
        rolls=0.3,
        forms={"existence": 1, "counting": 4, "quadrant": 1, "spatial": 2, "colour": 3, "names": 1, "letters": 1},
    )
    if name == "small":
        return small
    held_out = _names(HELD_OUT_SMALL) + _names(HELD_OUT_FULL)
    full = replace(
        small,
        name="full",
        concepts=tuple(c for c in library().concepts if c not in held_out),
        held_out=held_out,
        size=128,
        most=6,
        fill=0.75,
        captions=40000,
        instructions=50000,
        validation=1000,
        test=240,
        kinds={**ASKED, "multiple_choice": 1.0, "reading": 1.0},
        existence=0.5,
        forms=None,
    )
    if name == "full":
        return full
    none = {"captions": 0, "instructions": 0, "validation": 0, "test": 0}
    if name == "reading":
        return replace(full, name="reading", words=100000, **none)
    parts = {"lists": 32000, "questions": 36000, "texts": 24000}
    return replace(full, name="pretrain", fill=0.55, jitter=True, rolls=0.5, **none, **parts)


TIERS = ("tiny", "small", "full", "pretrain", "reading")
