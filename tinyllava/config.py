"""Recipes: what a whole run is, as data.

A recipe is YAML (`recipes/*.yaml`, or a path). `base: NAME` inherits from another recipe, so that an experiment is a
diff; dotted keys, in the YAML or on the command line, replace one value:

    base: quickstart
    stages.finetune.tune.llm: {lora: {r: 16}, lr: 1.0e-3}

    tinyllava train quickstart stages.finetune.trainer.learning_rate=1e-4

Everything is checked here, before a model or a data file is opened: an unknown key is an error that names the nearest
one.
"""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from tinyllava.errors import UserError
from tinyllava.factory import Factory, nearest

PARTS = ("vision_tower", "connector", "llm")
NATIVE_TEMPLATE = "native"  # the tokenizer's own chat template: a name without a file in templates/


class Strict(BaseModel):
    """A mapping that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True)


def _named(value: Any) -> Any:
    """`llm: ID` is short for `llm: {name: ID}`."""
    return {"name": value} if isinstance(value, str) else value


def _one_of(kind: str) -> BeforeValidator:
    """`connector: mlp` is short for `connector: {mlp: {}}`: one name of `kind` and its options."""

    def validate(value: Any) -> Any:
        if value is None:  # a model that starts from a checkpoint has no connector of its own
            return None
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, dict) or len(value) != 1:
            found = " and ".join(map(str, value)) if isinstance(value, dict) and value else repr(value)
            raise ValueError(f"expected the name of one {Factory(kind).kind.singular} with its options, found {found}")
        ((name, options),) = value.items()
        return {str(name): options or {}}

    return BeforeValidator(validate)


class TokenizerSpec(Strict):
    """A byte-level BPE trained on the recipe's own training texts, for an LLM made from a config."""

    vocab_size: int = 2048


class LLMSpec(Strict):
    """An LLM by Hub id or local path (`name`), or made from a config with random weights (`config`)."""

    name: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | TokenizerSpec | None = None  # default: the LLM's own
    attn_implementation: str | None = None

    @model_validator(mode="after")
    def _either(self) -> "LLMSpec":
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (a Hub id or a local path) or `config` (random weights)")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("an LLM made from `config` needs `tokenizer`: a path, or {vocab_size: N} to train one")
        return self


class VisionTowerSpec(Strict):
    """A vision tower by Hub id or local path (`name`), or made from a config with random weights (`config`)."""

    name: str | None = None
    config: dict[str, Any] | None = None
    feature_layer: int | list[int] = -2
    feature_strategy: Literal["patch", "cls_patch"] = "patch"
    image_aspect: Literal["processor", "square", "pad", "crop"] = "processor"

    @model_validator(mode="after")
    def _either(self) -> "VisionTowerSpec":
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (a Hub id or a local path) or `config` (random weights)")
        return self


class ModelSpec(Strict):
    """The three boxes and the text format between them; or a `checkpoint` to start from, which brings all four."""

    llm: Annotated[LLMSpec | None, BeforeValidator(_named)] = None
    vision_tower: Annotated[VisionTowerSpec | None, BeforeValidator(_named)] = None
    connector: Annotated[dict[str, dict[str, Any]] | None, _one_of("connectors")] = None
    template: str | None = None
    compat: bool = False  # the original's ids and labels (Template.load), for parity and for its checkpoints
    checkpoint: str | None = None
    max_length: int = 2048
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @model_validator(mode="after")
    def _complete(self) -> "ModelSpec":
        missing = [part for part in PARTS if getattr(self, part) is None]
        if self.checkpoint is None and missing:
            raise ValueError(f"missing {', '.join(missing)} (or `checkpoint: DIR` to start from a trained model)")
        if self.checkpoint is not None and len(missing) < len(PARTS):
            raise ValueError("`checkpoint` brings its own parts: leave out llm, vision_tower and connector")
        return self


class DataSpec(Strict):
    """One source of samples. `weight` is how often an epoch passes over it: 2 means twice, 0.3 a seeded 30 %."""

    path: str
    images: str | list[str] | None = None
    weight: float = Field(1.0, gt=0)
    format: str | None = None
    split: str = "train"
    name: str | None = None
    streaming: bool = False


class TuneSpec(Strict):
    """How one part is trained: the tuning's name with its options, and the part's own learning rate."""

    tuning: Annotated[dict[str, dict[str, Any]], _one_of("tuning")]
    lr: float | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """`full`, `{lora: {r: 8}}` and `{lora: {r: 8}, lr: 1e-4}` all name a tuning."""
        if isinstance(value, str):
            return {"tuning": value}
        if isinstance(value, dict) and "tuning" not in value:
            named = {key: options for key, options in value.items() if key != "lr"}
            return {"tuning": named, **({"lr": value["lr"]} if "lr" in value else {})}
        return value


class Tune(Strict):
    """How each of the three parts is trained in a stage."""

    vision_tower: TuneSpec = TuneSpec(tuning="frozen")
    connector: TuneSpec = TuneSpec(tuning="full")
    llm: TuneSpec = TuneSpec(tuning="frozen")


class Stage(Strict):
    """One training stage: the data, what is trained of each part, and HF TrainingArguments passed straight through."""

    data: list[DataSpec] = Field(min_length=1)
    validation: list[DataSpec] | Annotated[float, Field(gt=0, lt=1)] | None = None
    template: str | None = None
    tune: Tune = Tune()
    global_batch_size: int = Field(128, gt=0)
    on_bad_sample: Literal["error", "skip"] = "error"
    max_length: int | None = Field(None, gt=0)
    trainer: dict[str, Any] = {}

    @field_validator("trainer")
    @classmethod
    def _no_is_a_word(cls, trainer: dict[str, Any]) -> dict[str, Any]:
        """`save_strategy: no` is what people write, and YAML reads False."""
        return {key: "no" if key.endswith("_strategy") and value is False else value for key, value in trainer.items()}


class Recipe(Strict):
    """A whole run. `eval` names the benchmarks scored after the last stage."""

    model: ModelSpec
    stages: dict[str, Stage] = Field(min_length=1)
    eval: list[str] = []
    seed: int = 42

    def fingerprint(self) -> str:
        """A short hash of everything the recipe says: two runs of one directory must agree on it."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The resolved recipe, defaults left out, as YAML that `load_recipe` reads back."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json", exclude_defaults=True)))


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
        raise UserError(_explain(name, error)) from None
    except OmegaConfBaseException as error:
        raise UserError(f"recipe {name}: {str(error).splitlines()[0]}") from None
    _check_names(recipe)
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
    tree = OmegaConf.merge(tree, own)
    for key, value in dotted.items():
        _replace(tree, key, value)
    return tree


def _replace(tree: DictConfig, key: str, value: Any) -> None:
    OmegaConf.update(tree, key, value, merge=False, force_add=True)


def _explain(name: str, error: ValidationError) -> str:
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


def _check_names(recipe: Recipe) -> None:
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
    templates = [recipe.model.template, *(stage.template for stage in recipe.stages.values())]
    for template in filter(None, templates):
        if template != NATIVE_TEMPLATE and not template.endswith(".jinja"):
            Factory("templates").get(template)
    for stage_name, stage in recipe.stages.items():
        for part in PARTS:
            ((name, options),) = getattr(stage.tune, part).tuning.items()
            _check_options(f"stages.{stage_name}.tune.{part}.{name}", Factory("tuning").get(name), options)
        _check_trainer(f"stages.{stage_name}.trainer", stage.trainer)
    for benchmark in recipe.eval:
        Factory("benchmarks").get(benchmark)


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
