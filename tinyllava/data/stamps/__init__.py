"""Stamps, the embedded default dataset: pictures composed from drawings, so every answer is certain.

    data: [{path: stamps:tiny/captions}]      # in a recipe: tiny, small or full; captions, instructions or validation

`library` holds the drawings, `compose` makes scenes and pictures of them, `questions` asks about a scene, `plan`
decides a tier's records from a seed and `write` writes them. Needs Pillow and numpy only.
"""

from tinyllava.data.stamps.plan import trained_parts
from tinyllava.data.stamps.tiers import TIERS, Tier, tier
from tinyllava.data.stamps.write import prepare

__all__ = ["TIERS", "Tier", "prepare", "tier", "trained_parts"]
