"""Recipes: a whole training run as data. Read schema.py first, then read.py.

A recipe is YAML: a file in recipes/, or a path. `base: NAME` inherits from another recipe, so an experiment contains
only what it changes. Dotted keys, in the YAML or on the command line, replace one value:

    base: quickstart
    stages.finetune.tune.llm: {lora: {r: 16}, lr: 1.0e-3}

    tinyllava train quickstart stages.finetune.trainer.learning_rate=1e-4

The whole recipe is checked before a model or a data file is opened. An unknown key is an error that suggests the
nearest one.
"""

from tinyllava.config.read import load_recipe
from tinyllava.config.schema import (
    NATIVE_TEMPLATE,
    PART_TITLES,
    PARTS,
    DataSpec,
    LLMSpec,
    ModelSpec,
    Recipe,
    Stage,
    TokenizerSpec,
    Tune,
    TuneSpec,
    VisionTowerSpec,
)

__all__ = [
    "NATIVE_TEMPLATE",
    "PARTS",
    "PART_TITLES",
    "DataSpec",
    "LLMSpec",
    "ModelSpec",
    "Recipe",
    "Stage",
    "TokenizerSpec",
    "Tune",
    "TuneSpec",
    "VisionTowerSpec",
    "load_recipe",
]
