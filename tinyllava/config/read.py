"""Reading a recipe: YAML, what it inherits (`base:`) and dotted overrides, merged and then checked."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from tinyllava.config.check import check_names, explain
from tinyllava.config.schema import Recipe
from tinyllava.errors import UserError
from tinyllava.factory import Factory


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read, merge and check the recipe `name` (a built-in one or a YAML file) with dotted `key=value` overrides.

    Raises UserError with the nearest valid name for an unknown recipe, key, part, template, tuning or benchmark.
    """
    tree = _read(name, seen=())
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"cannot read the override '{override}': expected key=value, like seed=1.")
        _replace(tree, key, _parse(f"value: {text}", f"the override '{override}'").get("value"))
    try:
        recipe = Recipe.model_validate(OmegaConf.to_container(tree, resolve=True))
    except ValidationError as error:
        raise UserError(explain(name, error)) from None
    except OmegaConfBaseException as error:
        raise UserError(f"recipe {name}: {str(error).splitlines()[0]}") from None
    check_names(recipe)
    return recipe


def _parse(text: str, what: str) -> DictConfig:
    try:
        return OmegaConf.create((yaml.safe_load(text) and text) or "{}")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"cannot read {what}{where}: {getattr(error, 'problem', error)}. Expected YAML.") from None


def _read(name: str, seen: tuple[str, ...]) -> DictConfig:
    """The recipe's tree with everything it inherits: nested mappings merge, dotted keys replace."""
    is_file = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_file else Factory("recipes").path(name)
    if not path.is_file():
        raise UserError(
            f"recipe file {name} not found. Give a YAML file, or one of: {', '.join(Factory('recipes').names())}."
        )
    if str(path) in seen:
        raise UserError(f"recipe {name} inherits from itself: {' -> '.join([*seen, str(path)])}.")
    own = _parse(path.read_text(encoding="utf-8"), f"recipe {name}")
    base = own.pop("base", None)
    if base is not None and is_file and base.endswith((".yaml", ".yml")):
        base = str(path.parent / base)  # a base file lies beside the recipe that names it
    tree = _read(base, (*seen, str(path))) if base else OmegaConf.create({})
    dotted = {key: own.pop(key) for key in list(own) if "." in str(key)}
    tree = _in_order(OmegaConf.merge(tree, own), own.get("stages"))
    for key, value in dotted.items():
        _replace(tree, key, value)
    return tree


def _in_order(tree: DictConfig, stages: DictConfig | None) -> DictConfig:
    """A recipe that lists all stages says their order as well: a new one may come between inherited ones."""
    if stages is not None and set(stages) == set(tree.stages):
        tree.stages = {name: tree.stages[name] for name in stages}
    return tree


def _replace(tree: DictConfig, key: str, value: Any) -> None:
    OmegaConf.update(tree, key, value, merge=False, force_add=True)
