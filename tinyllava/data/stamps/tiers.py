"""The three sizes of the dataset: which concepts, how many of them in one picture, how many pictures.

What is held out of training is held out of every tier, so that a tower trained on `full` may be tested on `small`.
"""

from dataclasses import dataclass

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
    turns: int  # questions about one picture, at most
    kinds: dict[str, float]  # kind of question -> weight in instructions


SEEN = {
    "naming": 1.0,
    "category": 0.5,
    "existence": 3.0,
    "counting": 2.0,
    "quadrant": 2.0,
    "spatial": 2.5,
    "colour": 0.7,
    "background_colour": 0.2,
    "corner_naming": 1.5,
}


def tier(name: str) -> Tier:
    """The tier of that name: tiny, small or full."""
    if name == "tiny":
        return Tier(
            "tiny", _names(TINY), (), 64, 3, 2, True, 0.85, ("plain", "gradient"), 8000, 10000, 300, 160, 8, SEEN
        )
    more = {**SEEN, "multiple_choice": 1.0}
    patterns = ("plain", "gradient", "stripes", "dots")
    if name == "small":
        concepts = _names(TINY) + _names(SMALL)
        return Tier(
            "small",
            concepts,
            _names(HELD_OUT_SMALL),
            64,
            4,
            None,
            True,
            0.85,
            patterns,
            16000,
            20000,
            500,
            200,
            8,
            more,
        )
    held_out = _names(HELD_OUT_SMALL) + _names(HELD_OUT_FULL)
    concepts = tuple(c for c in library().concepts if c not in held_out)
    more["reading"] = 1.0
    return Tier("full", concepts, held_out, 128, 6, None, True, 0.75, patterns, 40000, 50000, 1000, 240, 8, more)


TIERS = ("tiny", "small", "full")
