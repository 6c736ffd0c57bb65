"""Read a recipe: merge its YAML, the recipe that it inherits from (`base:`) and dotted overrides, then check it."""

import os
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from tinyllava.config.check import check_names, explain_error
from tinyllava.config.schema import Recipe
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.yaml_faults import YAML_FAULTS, explain_yaml_fault


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read, merge and check the recipe `name` (a built-in one or a YAML file) with dotted `key=value` overrides.

    Raises UserError with the nearest valid name for an unknown recipe, key, part, template, tuning or benchmark.
    """
    try:
        tree = _read_tree(name, seen=())
        for override in overrides or []:
            key, equals, text = override.partition("=")
            if not equals or not key:
                raise UserError(f"cannot read the override '{override:.80}': expected key=value, like seed=1.")
            _replace_value(tree, key, _parse_yaml(f"value: {text}", f"the override '{override:.80}'").get("value"))
    except (OmegaConfBaseException, IndexError, TypeError, ValueError) as error:  # a list where its base has keys
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read recipe {name}: {reason}. Entries of a list have numbers: data.0.path.") from None
    recipe = _validate(tree, name)
    check_names(recipe)
    return recipe


def parse_recipe(text: str, name: str) -> Recipe:
    """The recipe in a text that `Recipe.to_yaml` wrote. Raises UserError if it cannot be read."""
    return _validate(_parse_yaml(text, f"recipe {name}"), name, resolve=False)  # only masked secrets are left


def _validate(tree: DictConfig, name: str, resolve: bool = True) -> Recipe:
    try:
        return Recipe.model_validate(OmegaConf.to_container(tree, resolve=resolve))
    except ValidationError as error:
        raise UserError(explain_error(name, error)) from None
    except OmegaConfBaseException as error:
        raise UserError(f"recipe {name}: {str(error).splitlines()[0]}") from None


def _parse_yaml(text: str, what: str) -> DictConfig:
    # PyYAML reads the text first, because its errors name line and column. An empty text stands for an empty mapping.
    try:
        if not isinstance(parsed := yaml.safe_load(text), dict | None):
            raise yaml.YAMLError(f"found a {type(parsed).__name__} instead of keys with values")
        return OmegaConf.create((parsed and text) or "{}")
    except YAML_FAULTS as error:
        raise explain_yaml_fault(error, what) from None


def _read_tree(name: str, seen: tuple[str, ...]) -> DictConfig:
    """The tree of a recipe with everything it inherits: nested mappings are merged, dotted keys replace."""
    is_file = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_file else Factory("recipes").find_path(name)
    if not os.path.isfile(path):
        raise UserError(f"recipe file {name} not found. Give a YAML file, or a built-in name such as quickstart.")
    if str(path) in seen:
        raise UserError(f"recipe {name} inherits from itself: {' -> '.join([*seen, str(path)])}.")
    # Bytes that are no text become characters that YAML refuses, with their position.
    recipe = _parse_yaml(path.read_text(encoding="utf-8", errors="surrogateescape"), f"recipe {name}")
    base = str(recipe.pop("base", None) or "")
    if is_file and base.endswith((".yaml", ".yml")):
        base = str(path.parent / base)  # relative to the recipe that names it
    tree = _read_tree(base, (*seen, str(path))) if base else OmegaConf.create({})
    dotted = {key: recipe.pop(key) for key in list(recipe) if "." in str(key)}
    tree, stages = OmegaConf.merge(tree, recipe), recipe.get("stages")
    # All are listed: a new one can come between others.
    if isinstance(stages, DictConfig) and set(stages) == set(tree.stages):
        tree.stages = {name: tree.stages[name] for name in stages}
    for key, value in dotted.items():
        _replace_value(tree, key, value)
    return tree


def _replace_value(tree: DictConfig, key: str, value: Any) -> None:
    OmegaConf.update(tree, key, value, merge=False, force_add=True)
