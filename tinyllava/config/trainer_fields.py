"""Check the keys and values of `trainer:`, which become TrainingArguments. The rules are in trainer.yaml."""

import math
import re
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from tinyllava.errors import UserError
from tinyllava.factory import suggest_nearest

RULES = yaml.safe_load(Path(__file__).with_name("trainer.yaml").read_text(encoding="utf-8"))
REFUSED = {field: reason for reason, names in RULES["refused"].items() for field in names}


def check_trainer(where: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `trainer:` as TrainingArguments takes them: with the right types, without those that are ours.

    where: the place of `options` in the recipe, for messages. Raises UserError for an unknown key, a key without effect
    and a value that is not valid, with the nearest valid one.
    """
    if not options:
        return {}
    from transformers import TrainingArguments

    hints, known = get_type_hints(TrainingArguments), {field.name: field for field in fields(TrainingArguments)}
    hints["fsdp"] = bool | str | None  # transformers documents `fsdp: true`
    former, passed = RULES["former"], {}
    for key, value in options.items():
        if key in former and value:
            raise UserError(f"{where}.{key} is not a field of TrainingArguments. {former[key]}.")
        if key not in known and key not in former:
            close = suggest_nearest(key, known)
            raise UserError(f"unknown key '{where}.{key}'{close} Known: the fields of TrainingArguments.")
        if key in known:
            value = _convert_value(f"{where}.{key}", hints[key], value)
            check_value(where, known[key], value, hints[key])
        if key in known and key not in RULES["replaced"] and key not in REFUSED:
            passed[key] = value
    return passed


def _convert_value(where: str, hint: Any, value: Any) -> Any:
    """The value as the field's type: a number in quotes becomes a number."""
    try:
        return TypeAdapter(hint, config={"arbitrary_types_allowed": True}).validate_python(value)
    except ValidationError:
        kind = hint.__name__ if isinstance(hint, type) else re.sub(r"transformers[\w.]* \| |typing\.", "", str(hint))
        raise UserError(f"{where}: expected {kind}, found {value!r}.") from None


def check_value(where: str, field: Field, value: Any, hint: Any) -> None:
    """Raise UserError for a value that has no effect, or is not valid. The default is always accepted."""
    key, replaced = field.name, RULES["replaced"]
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if value == default or (key in RULES["also_accepted"] and value == RULES["also_accepted"][key]):
        return
    if key in replaced:
        raise UserError(f"{where}.{key} follows from `{replaced[key]}`. Set `{replaced[key]}` instead.")
    if key in REFUSED:
        raise UserError(f"{where}.{key} has no effect here: {REFUSED[key]}. Remove it.")
    enums = [each for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum) for each in kind]
    listed = RULES["choices"].get(key) or field.metadata.get("choices") or [each.value for each in enums]
    choices = [str(choice) for choice in listed]
    words = " ".join(str(getattr(each, "value", each)) for each in (value if isinstance(value, list) else [value]))
    for word in words.split() if choices else ():  # `fsdp: full_shard offload`
        if word not in choices:
            begun = (choice for choice in choices if choice.startswith(word.lower()))
            close = suggest_nearest(next(begun, word.lower()), choices)
            known = f" Known: {', '.join(choices)}." if close == "." else ""
            raise UserError(f"{where}.{key}: unknown value '{word}'{close}{known}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        is_positive, is_share = key in RULES["positive"], key == "label_smoothing_factor"
        if not 0 <= value < (1 if is_share else math.inf) or (is_positive and value == 0):
            expected = "from 0 to below 1" if is_share else "above 0" if is_positive else "of 0 or more"
            raise UserError(f"{where}.{key}: expected a number {expected}, found {value}.")
