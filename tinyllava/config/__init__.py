"""Recipes: a whole training run as data. Read schema.py first, then read.py.

A recipe is YAML: a file in recipes/, or a path. `base: NAME` inherits from another recipe, so an experiment contains
only what it changes. Dotted keys, in the YAML or on the command line, replace one value:

    base: quickstart
    stages.finetune.tune.llm: {lora: {r: 16}, lr: 1.0e-3}

    tinyllava train quickstart stages.finetune.trainer.learning_rate=1e-4

The whole recipe is checked before a model or a data file is opened. An unknown key is an error that suggests the
nearest one.
"""

from tinyllava.config.read import load_recipe as load_recipe
from tinyllava.config.schema import NATIVE_TEMPLATE as NATIVE_TEMPLATE
from tinyllava.config.schema import PART_TITLES as PART_TITLES
from tinyllava.config.schema import PARTS as PARTS
from tinyllava.config.schema import DataSpec as DataSpec
from tinyllava.config.schema import LLMSpec as LLMSpec
from tinyllava.config.schema import ModelSpec as ModelSpec
from tinyllava.config.schema import Recipe as Recipe
from tinyllava.config.schema import Stage as Stage
from tinyllava.config.schema import TokenizerSpec as TokenizerSpec
from tinyllava.config.schema import Tune as Tune
from tinyllava.config.schema import TuneSpec as TuneSpec
from tinyllava.config.schema import VisionTowerSpec as VisionTowerSpec
