"""Stamps, the default dataset that comes with the package: images composed from drawings, so every answer is certain.

    data: [{path: stamps:tiny/captions}]      # in a recipe: stamps:TIER/SUBSET

A tier is a size of the dataset (tiny, small, full), and a subset is one file of it (captions, instructions,
validation). `library` reads the drawings, `compose` makes scenes and draws them, `questions` asks about a scene, `plan`
decides the records of a tier from a seed and `write` writes them. All of this requires Pillow and numpy only. Read
plan.py first. nano_tower.py, which requires torch, pretrains the small vision tower of the package on stamps.
"""

from tinyllava.stamps.plan import list_training_subsets
from tinyllava.stamps.tiers import TIERS, Tier, get_tier
from tinyllava.stamps.write import prepare_tier

__all__ = ["TIERS", "Tier", "get_tier", "list_training_subsets", "prepare_tier"]
