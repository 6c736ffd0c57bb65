"""Recipes: inheritance, dotted overrides, and errors that name the nearest valid key before anything is loaded."""

from pathlib import Path

import pytest

from tinyllava.config import load_recipe
from tinyllava.config.read import parse_recipe
from tinyllava.errors import UserError
from tinyllava.factory import Factory

BASE = """
model:
  llm: some/llm
  vision_tower: some/tower
  connector: mlp2x_gelu
stages:
  one:
    data: [{path: a.json, images: pictures}]
    tune: {llm: full}
    trainer: {learning_rate: 1.0e-3}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def test_short_forms_are_understood(base: Path) -> None:
    recipe = load_recipe(
        str(base), ["stages.one.tune.llm={lora: {r: 8}, lr: 2e-4}", "stages.one.trainer.learning_rate=1e-4"]
    )
    assert recipe.model.llm.name == "some/llm" and recipe.model.connector == {"mlp2x_gelu": {}}
    tune = recipe.stages["one"].tune
    assert tune.llm.tuning == {"lora": {"r": 8}} and tune.llm.lr == 2e-4
    assert tune.connector.tuning == {"full": {}} and tune.vision_tower.tuning == {"frozen": {}}
    assert recipe.stages["one"].trainer["learning_rate"] == 1e-4


def test_an_experiment_is_a_diff(base: Path) -> None:
    child = base.with_name("child.yaml")
    child.write_text(
        "base: base.yaml\nstages.one.tune.llm: {lora: {r: 128, alpha: 256}, lr: 2.0e-4}\n"
        "stages: {one: {trainer: {weight_decay: 0.1}}}\nmodel.connector: {mlp: {layers: 3}}\n"
    )
    recipe = load_recipe(str(child))
    assert recipe.stages["one"].tune.llm.tuning == {"lora": {"r": 128, "alpha": 256}}
    assert recipe.stages["one"].trainer == {"learning_rate": 1e-3, "weight_decay": 0.1}
    assert recipe.model.connector == {"mlp": {"layers": 3}}
    assert recipe.compute_hash() != load_recipe(str(base)).compute_hash()


def test_a_resolved_recipe_reads_back(base: Path) -> None:
    recipe = load_recipe(str(base), ["seed=7", "stages.one.tune.vision_tower={partial: {last: 2}}"])
    written = base.with_name("resolved.yaml")
    written.write_text(recipe.to_yaml())
    assert load_recipe(str(written)) == recipe


@pytest.mark.parametrize(
    "override,words",
    [
        ("stages.one.tune.lm=full", ["unknown key 'stages.one.tune.lm'", "did you mean 'llm'"]),
        ("model.conector=mlp", ["unknown key 'model.conector'", "did you mean 'connector'"]),
        ("stages.one.datas=[]", ["did you mean 'data'"]),
        ("stages.one.early_stopping=3", ["early_stopping: expected a mapping with patience, threshold, found 3"]),
        ("stages.one.data=[{pat: a.json}]", ["unknown key 'stages.one.data.0.pat'", "'path'"]),
        ("model.connector=mlp2x_gelux", ["unknown connector 'mlp2x_gelux'"]),
        ("model.connector={mlp: {layer: 3}}", ["unknown option 'layer'", "did you mean 'layers'"]),
        ("model.template=fi", ["unknown template 'fi'", "phi"]),
        ("stages.one.tune.llm=lorra", ["unknown tuning 'lorra'", "did you mean 'lora'"]),
        ("stages.one.tune.llm={lora: {rank: 8}}", ["unknown option 'rank'", "Known: r, alpha, dropout, targets"]),
        ("stages.one.tune.llm={lora: {r: many}}", ["stages.one.tune.llm.lora.r", "'many'"]),
        ("stages.one.tune.llm={lora: {}, full: {}}", ["one tuning", "lora and full"]),
        ("stages.one.trainer.learning_rat=1", ["stages.one.trainer.learning_rat", "did you mean 'learning_rate'"]),
        ("stages.one.trainer.learning_rate=fast", ["stages.one.trainer.learning_rate", "'fast'"]),
        ("stages.one.trainer.gradient_accumulation_steps=4", ["global_batch_size"]),
        ("stages.one.global_batch_size=some", ["stages.one.global_batch_size", "'some'"]),
        ("stages.one.global_batch_size=0", ["greater than 0"]),
        ("eval=[stamp]", ["unknown benchmark 'stamp'", "did you mean 'stamps'"]),
        ("model.llm={}", ["model.llm", "either `name`", "`config`"]),
        ("model.lacking={template: phi}", ["`lacking` is for", "`checkpoint`"]),
        ("model={checkpoint: DIR, template: phi}", ["its own template", "lacking: {template: NAME}"]),
        ("model={checkpoint: DIR, lacking: {templat: phi}}", ["model.lacking.templat", "did you mean 'template'"]),
        ("seed", ["expected key=value"]),
        ("seed=[1", ["cannot read the override"]),
        ("seed=-1", ["seed: Input should be greater than or equal to 0, found -1"]),
        ("seed=4294967296", ["seed: Input should be less than 4294967296"]),
        ("model.max_length=0", ["model.max_length: Input should be greater than 0"]),
        ("model.llm=''", ["model.llm.name: String should have at least 1 character"]),
        ("model.llm={config: {model_type: llama}, tokenizer: {vocab_size: -4}}", ["tokenizer.vocab_size", "found -4"]),
        ("stages.one.data.path=x", ["invalid literal for int() with base 10: 'path'", "data.0.path"]),
        ("stages.one.data.0.path=''", ["stages.one.data.0.path: String should have at least 1 character"]),
        ("stages.one.validation=1.5", ["stages.one.validation: Input should be less than 1, found 1.5"]),
        ("seed=${", ["cannot read recipe", "input '${'"]),
    ],
)
def test_what_is_wrong_is_named_in_two_lines(override: str, words: list[str], base: Path) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(str(base), [override])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 2


@pytest.mark.parametrize(
    "value",
    [
        "!!bool x",
        "!!int x",
        "!!int ''",
        "!!float ''",
        "!!timestamp x",
        "!!set {a}",
        "2020-13-01",
        "0b_",
        "[" * 2000,
    ],
)
def test_a_value_that_yaml_cannot_convert_is_refused(value: str, base: Path) -> None:
    for read in (lambda: load_recipe(str(base), [f"seed={value}"]), lambda: parse_recipe(f"seed: {value}", "mine")):
        with pytest.raises(UserError, match=r"cannot read .*Expected YAML") as error:
            read()
        assert len(str(error.value)) < 3000


def test_unknown_and_broken_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown recipe 'quickstar'; did you mean 'quickstart'"):
        load_recipe("quickstar")
    for name in ("x" * 300 + ".yaml", "a\0.yaml"):
        with pytest.raises(UserError, match="not found"):
            load_recipe(name)
    with pytest.raises(UserError, match=r"nowhere\.yaml not found"):
        load_recipe("nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("model: [1\nstages: 3")
    with pytest.raises(UserError, match=r"cannot read recipe .*broken\.yaml at line"):
        load_recipe(str(tmp_path / "broken.yaml"))
    (tmp_path / "loop.yaml").write_text("base: loop.yaml")
    with pytest.raises(UserError, match="inherits from itself"):
        load_recipe(str(tmp_path / "loop.yaml"))


def test_every_recipe_of_the_package_parses() -> None:
    for name in Factory("recipes").list_names():
        assert load_recipe(name).stages


BROKEN = {  # text of a recipe: words of its error
    "42": "found a int instead of keys with values",
    "quickstart": "found a str instead of keys with values",
    "base: [quickstart]": "unknown recipe '['quickstart']'; did you mean 'quickstart'?",
    "base: 5": "unknown recipe '5'",
    "base: quickstart\nstages: [a]": "Cannot merge incompatible container types",
    "base: quickstart\neval: {stamps: 1}": "Cannot merge incompatible container types",
    "base: quickstart\nstages: 5": "stages: Input should be a valid dictionary, found 5",
    "base: quickstart\neval: !!set {a}": "Value 'set' is not a supported primitive type",
    "base: quickstart\n~: 3": "Incompatible key type 'NoneType'",
    "base: quickstart\nseed: ${": "no viable alternative at input '${'",
}


def test_a_file_that_is_no_recipe_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(UserError, match=r"cannot read recipe .*mine\.yaml: found a list instead of keys with values"):
        load_recipe(str(path))
    for text, problem in BROKEN.items():
        path.write_text(text)
        with pytest.raises(UserError) as error:
            load_recipe(str(path))
        assert problem in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(b"base: quickstart \x86\xff")
    with pytest.raises(UserError, match=r"cannot read recipe .*mine\.yaml: unacceptable character"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    "override",
    ["[seed=1", "seed=" + "9" * 5000, "=1", "x" * 5000, "9" * 5000 + "=1", f"model.connector=mlp2x{'9' * 5000}"],
)
def test_an_override_of_another_form_is_refused_in_a_line(override: str) -> None:
    with pytest.raises(UserError, match=r"^(cannot read|recipe|unknown)") as error:
        load_recipe("quickstart", [override])
    assert len(str(error.value)) < 1000
