"""Check a recipe: explain errors of the schema, and find names and options that do not exist."""

import inspect
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from tinyllava.config.schema import NATIVE_TEMPLATE, PARTS, Recipe, TokenizerSpec
from tinyllava.config.trainer_fields import check_trainer
from tinyllava.errors import UserError
from tinyllava.factory import Factory, suggest_known, suggest_nearest


def explain_error(name: str, error: ValidationError) -> str:
    """The message for the first error of a recipe, in one line. It suggests the nearest key for an unknown one."""
    # An unknown key comes first: a misspelt key is often also reported as a missing one.
    # `validation: 1.5` is not a list, but it is meant as a share.
    order = {"extra_forbidden": 0, "list_type": 2, "string_type": 2}
    fault = min(error.errors(), key=lambda fault: order.get(fault["type"], 1))
    where = ".".join(str(step) for step in fault["loc"] if not _is_branch(step))
    more = f" ({error.error_count() - 1} more.)" if error.error_count() > 1 else ""
    if fault["type"] == "extra_forbidden":
        known = _list_keys_beside(fault["loc"])
        close = suggest_nearest(str(fault["loc"][-1]), known)
        return f"recipe {name}: unknown key '{where}'{close} Known here: {', '.join(known)}.{more}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "model_type":
        message = f"expected a mapping with {', '.join(_list_keys_beside((*fault['loc'], '')))}"
    value = fault.get("input")
    ending = f", found {value!r}" if isinstance(value, str | int | float | bool) and "found" not in message else ""
    return f"recipe {name}: {where or 'top level'}: {message}{ending}.{more}"


def _is_branch(step: Any) -> bool:
    """Whether a step of pydantic's location is the branch of a union (`list[DataSpec]`, `function-before[...]`).

    Such a step is not a key of the recipe.
    """
    return isinstance(step, str) and ("[" in step or step in {"constrained-float", "int", "str", "TokenizerSpec"})


def _list_keys_beside(location: tuple) -> list[str]:
    """The valid keys of the mapping that holds `location`."""
    model: Any = Recipe
    for step in location[:-1]:
        if isinstance(step, str) and isinstance(model, type) and step in model.model_fields:
            model = _find_model(model.model_fields[step].annotation)
        elif step == "TokenizerSpec":
            model = TokenizerSpec
    return list(model.model_fields) if isinstance(model, type) else []


def _find_model(annotation: Any) -> Any:
    """The pydantic model inside an annotation such as `X | None`, `list[X]` or `dict[str, X]`; None without one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _find_model(inner)) is not None), None)


def check_names(recipe: Recipe) -> None:
    """Raise UserError unless all parts, templates, tunings and benchmarks of a recipe exist and have its options."""
    if recipe.model.connector:
        ((name, options),) = recipe.model.connector.items()
        connector, options = Factory("connectors").resolve(name, options)
        parameters = inspect.signature(connector).parameters
        known = [key for key in parameters if key not in ("vision_dim", "text_dim")]
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for key in (key for key in options if key not in known and not takes_all):
            raise UserError(f"unknown option '{key}' of model.connector.{name}{suggest_known(key, known)}")
    for kind, part in (("llms", recipe.model.llm), ("vision_towers", recipe.model.vision_tower)):
        if part is not None and part.family is not None:
            Factory(kind).get(part.family)
    templates = [recipe.model.template, *(stage.template for stage in recipe.stages.values())]
    for template in filter(None, templates):
        if template != NATIVE_TEMPLATE and not template.endswith(".jinja"):
            Factory("templates").get(template)
    for stage_name, stage in recipe.stages.items():
        for part in PARTS:
            ((name, options),) = getattr(stage.tune, part).tuning.items()
            _check_options(f"stages.{stage_name}.tune.{part}.{name}", Factory("tuning").get(name), options)
        check_trainer(f"stages.{stage_name}.trainer", stage.trainer)
    for task in recipe.eval:
        # A .jsonl file holds the user's own questions. `mme-likelihood` scores the benchmark mme (eval/choose.py).
        if not task.endswith(".jsonl"):
            Factory("benchmarks").resolve(task.partition("-likelihood")[0], {})


def _check_options(where: str, tuning: type, options: dict[str, Any]) -> None:
    try:
        TypeAdapter(tuning).validate_python(options)
    except ValidationError as error:
        fault = error.errors()[0]
        key, known = str(fault["loc"][0]) if fault["loc"] else "", list(tuning.__dataclass_fields__)
        if key not in known:
            raise UserError(f"unknown option '{key}' of {where}{suggest_known(key, known)}") from None
        raise UserError(f"{where}.{key}: {fault['msg']}, found {fault['input']!r}.") from None
