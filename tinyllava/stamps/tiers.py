"""The tiers of the dataset: which concepts each has, how many images, and how many things in one of them.

A concept that one tier holds out of training is held out of every tier. So a tower trained on `full` may be tested on
`small`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tinyllava.stamps.library import load_library

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


@dataclass(frozen=True)
class Tier:
    """What one tier holds. A subset's number is its records; `test` is the questions per category."""

    name: str
    concepts: tuple[str, ...]
    held_out: tuple[str, ...]
    size: int  # pixels a side
    most: int  # the largest number of things in one image
    drawings: int | None  # how many drawings of each concept are used (None: all)
    flips: bool  # mirror drawings at random
    fill: float  # the least share of its cell that a thing takes
    patterns: tuple[str, ...]
    captions: int
    instructions: int
    validation: int
    test: int
    turns: int  # the largest number of questions in a conversation
    kinds: dict[str, float]  # kind of question -> how often a conversation tries to ask one
    existence: float = 0.5  # share of conversations that begin with existence questions
    rolls: float = 0.0  # share of conversations that ask one question about several things
    forms: dict[str, int] | None = None  # how often each form of such a question is chosen (None: roll_calls.ROLLS)
    lists: int = 0  # lists of what is in an image, each with one question about several things, answered by name
    questions: int = 0  # such lists with questions of all kinds
    texts: int = 0  # conversations about an image that is described in words
    words: int = 0  # images of one to three invented words
    jitter: bool = False  # change saturation and brightness of drawings a little


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
NO_SUBSETS = {"captions": 0, "instructions": 0, "validation": 0, "test": 0}


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in text.split())


def _build_tiny() -> Tier:
    """24 concepts: what random weights can learn in minutes on a CPU."""
    return Tier(
        "tiny",
        _split_names(TINY),
        held_out=(),
        size=64,
        most=3,
        # One drawing, never mirrored: a tower from random weights then learns the names in two thirds of the steps
        # that two drawings and their mirror images take.
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


def _build_small() -> Tier:
    """107 concepts: the quickstart's."""
    # More of what a model has not learned after 1,000 steps, less of what the LLM of the package has read about.
    more = {"multiple_choice": 1.0, "category": 4.0, "background_colour": 1.0, "quadrant": 1.0, "naming": 0.5}
    return Tier(
        "small",
        _split_names(TINY) + _split_names(SMALL),
        held_out=_split_names(HELD_OUT_SMALL),
        size=96,
        most=4,
        drawings=None,
        flips=True,
        fill=0.85,
        patterns=("plain", "gradient", "stripes", "dots"),
        captions=6000,
        instructions=18000,
        validation=500,
        test=200,
        turns=8,
        kinds={**ASKED, **more},
        existence=0.25,
        rolls=0.3,
        forms={"existence": 1, "counting": 4, "quadrant": 1, "spatial": 2, "colour": 3, "names": 1, "letters": 1},
    )


def _build_full() -> Tier:
    """Every concept that is not held out: what the model `nano` is trained on."""
    held_out = _split_names(HELD_OUT_SMALL) + _split_names(HELD_OUT_FULL)
    return replace(
        _build_small(),
        name="full",
        concepts=tuple(c for c in load_library().concepts if c not in held_out),
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


def _build_pretrain() -> Tier:
    """The concepts of `full`, for pretraining the vision tower and the LLM of the package. It has no test."""
    subsets = {**NO_SUBSETS, "lists": 32000, "questions": 36000, "texts": 24000}
    return replace(_build_full(), name="pretrain", fill=0.55, jitter=True, rolls=0.5, **subsets)


def _build_reading() -> Tier:
    """The concepts of `full`, for learning to read words. It has no test."""
    return replace(_build_full(), name="reading", words=100000, **NO_SUBSETS)


BUILDERS: dict[str, Callable[[], Tier]] = {
    "tiny": _build_tiny,
    "small": _build_small,
    "full": _build_full,
    "pretrain": _build_pretrain,
    "reading": _build_reading,
}
TIERS = tuple(BUILDERS)


def get_tier(name: str) -> Tier:
    """Return the tier called `name`, one of TIERS."""
    return BUILDERS[name]()
