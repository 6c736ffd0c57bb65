"""The schema of a recipe, with its defaults and short forms. An unknown key is an error."""

import hashlib
import json
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from tinyllava.factory import Factory
from tinyllava.runs import check_stage_name
from tinyllava.secrets import mask_settings

PARTS = ("vision_tower", "connector", "llm")
PART_TITLES = {"vision_tower": "vision tower", "connector": "connector", "llm": "LLM"}  # names in messages
# Fields that earlier versions did not have, with their defaults: the hash of an earlier recipe must not change.
ADDED_LATER = {"early_stopping": None, "supervised_turns": "all", "add_tokens": [], "urls": False}
NATIVE_TEMPLATE = "native"  # the tokenizer's own chat template: a name without a file in templates/


class StrictModel(BaseModel):
    """A mapping that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True)


def _expand_name(value: Any) -> Any:
    """`llm: ID` is short for `llm: {name: ID}`."""
    return {"name": value} if isinstance(value, str) else value


def _validate_choice(kind: str) -> BeforeValidator:
    """Validate one name of `kind` with its options. `connector: mlp` is short for `connector: {mlp: {}}`."""

    def validate(value: Any) -> Any:
        if value is None:  # a model that starts from a checkpoint names no connector
            return None
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, dict) or len(value) != 1:
            text = " and ".join(map(str, value)) if isinstance(value, dict) and value else repr(value)
            raise ValueError(f"expected the name of one {Factory(kind).kind.singular} with its options, found {text}")
        ((name, options),) = value.items()
        return {str(name): options or {}}

    return BeforeValidator(validate)


class TokenizerSpec(StrictModel):
    """A byte-level BPE that is trained on the recipe's training texts, for an LLM from a `config`."""

    vocab_size: int = Field(2048, gt=0)


class LLMSpec(StrictModel):
    """An LLM: its Hub id or local path (`name`), or the config of one with random weights (`config`)."""

    name: str | None = Field(None, min_length=1)
    config: dict[str, Any] | None = None
    tokenizer: str | TokenizerSpec | None = None  # default: the LLM's own
    family: str | None = None  # your own llms/ file: my_pkg.my_module:LLM
    attn_implementation: str | None = None

    @model_validator(mode="after")
    def _check_source(self) -> "LLMSpec":
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (a Hub id or a local path) or `config` (random weights)")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("an LLM from `config` requires `tokenizer`: a path, or {vocab_size: N} to train one")
        return self


class VisionTowerSpec(StrictModel):
    """A vision tower: its Hub id or local path (`name`), or the config of one with random weights (`config`)."""

    name: str | None = Field(None, min_length=1)
    config: dict[str, Any] | None = None
    feature_layer: int | list[int] = -2
    feature_strategy: Literal["patch", "cls_patch"] = "patch"
    family: str | None = None  # your own vision_towers/ file: my_pkg.my_module:VisionTower
    image_aspect: Literal["processor", "square", "pad", "crop"] = "processor"
    image_processor: str | None = None  # a preprocessor_config.json, or your own class: my_pkg.my_module:Name
    tiles: int | None = Field(None, ge=2)  # any-resolution: the maximum number of tiles, the thumbnail not counted

    @model_validator(mode="after")
    def _check_source(self) -> "VisionTowerSpec":
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (a Hub id or a local path) or `config` (random weights)")
        if ":" in (self.image_processor or "") and self.image_aspect != "processor":
            raise ValueError("your own `image_processor` sets the aspect: remove `image_aspect`")
        return self


class MissingValues(StrictModel):
    """Values that a `checkpoint` of another package may not contain.

    llava-hf checkpoints have no exact template. Those of the original TinyLLaVA Factory can miss any of these
    (`checkpoint.legacy.read_legacy`).
    """

    template: str | None = None
    image_processor: dict[str, Any] | None = None
    dinov2_config: dict[str, Any] | None = None
    qformer_config: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    tokenizer: str | None = None


class ModelSpec(StrictModel):
    """The three parts and the template; or a `checkpoint` to start from, which contains all four."""

    llm: Annotated[LLMSpec | None, BeforeValidator(_expand_name)] = None
    vision_tower: Annotated[VisionTowerSpec | None, BeforeValidator(_expand_name)] = None
    connector: Annotated[dict[str, dict[str, Any]] | None, _validate_choice("connectors")] = None
    template: str | None = None
    compat: bool = False  # token ids and labels of the original TinyLLaVA Factory (Template.load)
    checkpoint: str | None = Field(None, min_length=1)
    lacking: MissingValues = MissingValues()
    # Your own tokens, such as <loc_1> (docs/training.md).
    add_tokens: list[str] = []
    max_length: int = Field(2048, gt=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @model_validator(mode="after")
    def _check_complete(self) -> "ModelSpec":
        missing = [part for part in PARTS if getattr(self, part) is None]
        if self.checkpoint is None and missing:
            raise ValueError(f"missing {', '.join(missing)} (or `checkpoint: DIR` to start from a trained model)")
        if self.checkpoint is not None and len(missing) < len(PARTS):
            raise ValueError("`checkpoint` contains its own parts: remove llm, vision_tower and connector")
        if self.checkpoint is not None and (self.template or self.compat):
            raise ValueError(
                "`checkpoint` contains its own template: remove `template` and `compat`. For a checkpoint of another"
                " package use `lacking: {template: NAME}`, and for one stage its own `template`"
            )
        if self.checkpoint is None and self.lacking != MissingValues():
            raise ValueError("`lacking` is for a `checkpoint` of another package, and there is no `checkpoint`")
        return self

    def describe(self) -> str:
        """Where the model comes from, in a line: its checkpoint, or its three parts."""
        if self.checkpoint is not None:
            return self.checkpoint
        parts = (self.vision_tower, self.llm)
        tower, llm = (part.name or f"{part.config.get('model_type')} with random weights" for part in parts)
        return f"vision tower {tower}, connector {next(iter(self.connector))}, LLM {llm}"


class DataSpec(StrictModel):
    """One source of samples. `weight` is how often an epoch uses it: 2 is twice, 0.3 is a random 30 % (seeded)."""

    path: str = Field(min_length=1)
    images: str | list[str] | None = None
    weight: float = Field(1.0, gt=0)
    format: str | None = None
    split: str = "train"
    name: str | None = None
    streaming: bool = False
    urls: bool = False  # whether its records may name images by URL


class TuneSpec(StrictModel):
    """How one part is trained: the tuning's name with its options, and the part's own learning rate."""

    tuning: Annotated[dict[str, dict[str, Any]], _validate_choice("tuning")]
    lr: float | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        """`full`, `{lora: {r: 8}}` and `{lora: {r: 8}, lr: 1e-4}` are short forms."""
        if isinstance(value, str):
            return {"tuning": value}
        if isinstance(value, dict) and "tuning" not in value:
            named = {key: options for key, options in value.items() if key != "lr"}
            return {"tuning": named, **({"lr": value["lr"]} if "lr" in value else {})}
        return value


class Tune(StrictModel):
    """How each of the three parts is trained in a stage."""

    vision_tower: TuneSpec = TuneSpec(tuning="frozen")
    connector: TuneSpec = TuneSpec(tuning="full")
    llm: TuneSpec = TuneSpec(tuning="frozen")


class EarlyStopping(StrictModel):
    """End a stage after `patience` validations in a row whose loss is not lower than the best by over `threshold`."""

    patience: int = Field(gt=0)
    threshold: float = Field(0.0, ge=0, allow_inf_nan=False)


class Stage(StrictModel):
    """One training stage: its data, the tuning of each part, and the fields of TrainingArguments (`trainer`)."""

    data: list[DataSpec] = Field(min_length=1)
    validation: list[DataSpec] | Annotated[float, Field(gt=0, lt=1)] | None = None
    template: str | None = None
    tune: Tune = Tune()
    global_batch_size: int = Field(128, gt=0)
    on_bad_sample: Literal["error", "skip"] = "error"
    max_length: int | None = Field(None, gt=0)
    supervised_turns: Literal["all", "last"] = "all"
    early_stopping: EarlyStopping | None = None
    trainer: dict[str, Any] = {}

    @field_validator("trainer")
    @classmethod
    def _restore_no(cls, trainer: dict[str, Any]) -> dict[str, Any]:
        """Replace False by "no" in `*_strategy`: YAML reads `save_strategy: no` as False."""
        return {key: "no" if key.endswith("_strategy") and value is False else value for key, value in trainer.items()}


class Recipe(StrictModel):
    """A whole training run. `eval` names the benchmarks that are scored after the last stage."""

    model: ModelSpec
    stages: dict[Annotated[str, AfterValidator(check_stage_name)], Stage] = Field(min_length=1)
    eval: list[str] = []
    seed: int = Field(42, ge=0, lt=2**32)

    def compute_hash(self) -> str:
        """A short hash of the whole recipe: 16 hex digits."""
        tree = self.model_dump(mode="json")
        sections = [tree["model"], *tree["stages"].values()]
        for stage in tree["stages"].values():  # its `validation` is a share, or entries as in its `data`
            sections += [*stage["data"], *(stage["validation"] if isinstance(stage["validation"], list) else [])]
        for section in sections:
            for name, default in ADDED_LATER.items():
                if section.get(name) == default:
                    section.pop(name, None)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `load_recipe` reads, without secrets and values that equal the defaults."""
        return OmegaConf.to_yaml(OmegaConf.create(mask_settings(self.model_dump(mode="json", exclude_defaults=True))))
