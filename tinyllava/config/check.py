"""What is wrong with a recipe, in words: a fault of the schema explained, and names and options that do not exist."""

import inspect
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

from tinyllava.config.schema import NATIVE_TEMPLATE, PARTS, Recipe, TokenizerSpec
from tinyllava.errors import UserError
from tinyllava.factory import Factory, nearest


def explain(name: str, error: ValidationError) -> str:
    """The first fault of a recipe in one line, and the nearest valid key for an unknown one."""
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")  # a typo explains what is missing
    where = ".".join(str(step) for step in fault["loc"] if not _is_branch(step))
    more = f" ({error.error_count() - 1} more.)" if error.error_count() > 1 else ""
    if fault["type"] == "extra_forbidden":
        known = _keys_beside(fault["loc"])
        close = nearest(str(fault["loc"][-1]), known)
        return f"recipe {name}: unknown key '{where}'{close} Known here: {', '.join(known)}.{more}"
    message = fault["msg"].removeprefix("Value error, ")
    given = fault.get("input")
    found = f", found {given!r}" if isinstance(given, str | int | float | bool) and "found" not in message else ""
    return f"recipe {name}: {where or 'top level'}: {message}{found}.{more}"


def _is_branch(step: Any) -> bool:
    """pydantic names the branch of a union inside the location (`list[DataSpec]`, `function-before[...]`): no key of
    ours.
    """
    return isinstance(step, str) and ("[" in step or step in {"float", "int", "str", "TokenizerSpec"})


def _keys_beside(location: tuple) -> list[str]:
    """The keys that the mapping at `location` knows."""
    model: Any = Recipe
    for step in location[:-1]:
        if isinstance(step, str) and isinstance(model, type) and step in model.model_fields:
            model = _model_in(model.model_fields[step].annotation)
        elif step == "TokenizerSpec":
            model = TokenizerSpec
    return list(model.model_fields) if isinstance(model, type) else []


def _model_in(annotation: Any) -> Any:
    """The Strict model inside `X | None`, `list[X]`, `dict[str, X]` and their kin."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner)) is not None), None)


def check_names(recipe: Recipe) -> None:
    """Every part, template, tuning and benchmark a recipe names exists and takes the options it is given."""
    if recipe.model.connector:
        ((name, options),) = recipe.model.connector.items()
        connector, options = Factory("connectors").resolve(name, options)
        taken = inspect.signature(connector).parameters
        known = [key for key in taken if key not in ("vision_dim", "text_dim")]
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            for key in options:
                if key not in known:
                    says = f"unknown option '{key}' of model.connector.{name}{nearest(key, known)}"
                    raise UserError(f"{says} Known: {', '.join(known) or 'none'}.")
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
        _check_trainer(f"stages.{stage_name}.trainer", stage.trainer)
    for task in recipe.eval:
        if not task.endswith(".jsonl"):  # questions of the user's own
            Factory("benchmarks").resolve(task.partition("-likelihood")[0], {})


def _check_options(where: str, tuning: type, options: dict[str, Any]) -> None:
    try:
        TypeAdapter(tuning).validate_python(options)
    except ValidationError as error:
        fault = error.errors()[0]
        key, known = str(fault["loc"][0]) if fault["loc"] else "", list(tuning.__dataclass_fields__)
        if key not in known:
            raise UserError(
                f"unknown option '{key}' of {where}{nearest(key, known)} Known: {', '.join(known)}."
            ) from None
        raise UserError(f"{where}.{key}: {fault['msg']}, found {fault['input']!r}.") from None


def _check_trainer(where: str, options: dict[str, Any]) -> None:
    """`trainer:` goes to TrainingArguments as it is; its keys and plain types are checked against that class."""
    if not options:
        return
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    managed = {"gradient_accumulation_steps": "global_batch_size", "output_dir": "--output", "seed": "seed"}
    for key, value in options.items():
        if key in managed:
            raise UserError(f"{where}.{key} is decided by `{managed[key]}`: set that instead.")
        if key not in hints:
            raise UserError(
                f"unknown key '{where}.{key}'{nearest(key, list(hints))} Known: the fields of TrainingArguments."
            )
        try:
            TypeAdapter(hints[key], config={"arbitrary_types_allowed": True}).validate_python(value)
        except ValidationError:
            kind = str(hints[key]).replace("typing.", "")
            raise UserError(f"{where}.{key}: expected {kind}, found {value!r}.") from None
