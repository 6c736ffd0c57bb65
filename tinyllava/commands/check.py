"""`tinyllava data check RECIPE|FILE`: a recipe's data with the lengths that its own parts give, or a file as it is."""

from pathlib import Path
from typing import Any

from tinyllava.config import DataSpec, Recipe, load_recipe
from tinyllava.data.check import Report, check
from tinyllava.data.template import Template
from tinyllava.factory import Factory
from tinyllava.model import checkpoint
from tinyllava.model.build import build
from tinyllava.train.stage import training_samples


def check_source(source: str, images: list[str] | None = None) -> Report:
    """Read all of `source` in full. `images` are the folders of a file's pictures; a recipe names its own.

    Raises UserError for a name that is neither a recipe nor data that can be opened.
    """
    recipes = Factory("recipes")
    if source in recipes.names() or source.endswith((".yaml", ".yml")):
        return check_recipe(load_recipe(source))
    if not Path(source).exists() and not any(mark in source for mark in ".:/"):
        recipes.path(source)  # raises, with the nearest recipe
    return check([DataSpec(path=source, images=images)])


def check_recipe(recipe: Recipe) -> Report:
    """Read all data of a recipe, once for each template that it is trained with."""
    if recipe.model.checkpoint is None:
        _, processor, template = build(recipe.model, lambda: training_samples(recipe), recipe.seed, empty=True)
    else:
        _, processor, template, _ = checkpoint.load(Path(recipe.model.checkpoint), **recipe.model.lacking.given())
    total, seen = Report(), []
    for stage in recipe.stages.values():
        chosen = Template.load(stage.template, compat=template.compat) if stage.template else template
        validation = stage.validation if isinstance(stage.validation, list) else []
        for spec in [*stage.data, *validation]:
            one: tuple[Any, ...] = (spec, chosen, stage.max_length or recipe.model.max_length)
            if one in seen:
                continue
            seen.append(one)
            each, tiles = processor.tokens_per_image, processor.tiling
            report = check([spec], chosen, processor.tokenizer, each, one[2], tiles=tiles)
            total.records += report.records
            total.pictures += report.pictures
            total.text_only += report.text_only
            total.problems += report.problems
    return total
