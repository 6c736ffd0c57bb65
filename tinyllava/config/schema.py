"""The schema of a recipe: what can be said, and the short forms of saying it. An unknown key is an error."""

import hashlib
import json
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from tinyllava.factory import Factory

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
    family: str | None = None  # what loading it needs to know, in a file of your own: my_pkg.my_module:LLM
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
    family: str | None = None  # what loading it needs to know, in a file of your own: my_pkg.my_module:VisionTower
    image_aspect: Literal["processor", "square", "pad", "crop"] = "processor"
    image_processor: str | None = None  # a preprocessor_config.json, or the user's own class as my_pkg.my_module:Name
    tiles: int | None = Field(None, ge=2)  # any-resolution: the most tiles of a picture beside its thumbnail

    @model_validator(mode="after")
    def _either(self) -> "VisionTowerSpec":
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` (a Hub id or a local path) or `config` (random weights)")
        if ":" in (self.image_processor or "") and self.image_aspect != "processor":
            raise ValueError("an `image_processor` of your own decides the aspect: leave out `image_aspect`")
        return self


class Lacking(Strict):
    """What a `checkpoint` may not carry: llava-hf's an exact template, the original's any (`model.legacy.read`)."""

    template: str | None = None
    image_processor: dict[str, Any] | None = None
    dinov2_config: dict[str, Any] | None = None
    qformer_config: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    tokenizer: str | None = None

    def given(self) -> dict[str, Any]:
        """Keywords of `checkpoint.load`."""
        return self.model_dump(exclude_none=True)


class ModelSpec(Strict):
    """The three boxes and the text format between them; or a `checkpoint` to start from, which brings all four."""

    llm: Annotated[LLMSpec | None, BeforeValidator(_named)] = None
    vision_tower: Annotated[VisionTowerSpec | None, BeforeValidator(_named)] = None
    connector: Annotated[dict[str, dict[str, Any]] | None, _one_of("connectors")] = None
    template: str | None = None
    compat: bool = False  # the original's ids and labels (Template.load), for parity and for its checkpoints
    checkpoint: str | None = None
    lacking: Lacking = Lacking()
    max_length: int = 2048
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @model_validator(mode="after")
    def _complete(self) -> "ModelSpec":
        missing = [part for part in PARTS if getattr(self, part) is None]
        if self.checkpoint is None and missing:
            raise ValueError(f"missing {', '.join(missing)} (or `checkpoint: DIR` to start from a trained model)")
        if self.checkpoint is not None and len(missing) < len(PARTS):
            raise ValueError("`checkpoint` brings its own parts: leave out llm, vision_tower and connector")
        if self.checkpoint is not None and (self.template or self.compat):
            raise ValueError(
                "`checkpoint` brings its own template: leave `template` and `compat` out. One that we did not write"
                " takes `lacking: {template: NAME}`, and a stage its own `template`"
            )
        if self.checkpoint is None and self.lacking != Lacking():
            raise ValueError("`lacking` is for what a `checkpoint` that we did not write does not carry")
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
