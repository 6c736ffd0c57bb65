"""Recipes: what a whole run is, as data.

A recipe is YAML (`recipes/*.yaml`, or a path). `base: NAME` inherits from another recipe, so that an experiment is a
diff; dotted keys, in the YAML or on the command line, replace one value:

    base: quickstart
    stages.finetune.tune.llm: {lora: {r: 16}, lr: 1.0e-3}

    tinyllava train quickstart stages.finetune.trainer.learning_rate=1e-4

Everything is checked here, before a model or a data file is opened: an unknown key is an error that names the nearest
one.
"""

from tinyllava.config.read import load_recipe
from tinyllava.config.schema import (
    NATIVE_TEMPLATE,
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
