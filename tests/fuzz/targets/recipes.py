"""Recipes as YAML text, recipes that inherit, and overrides of the command line."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.fuzz.harness import Case
from tests.fuzz.mutate import TEXTS, edit_bytes, edit_texts, edit_trees, make_values, split_words
from tinyllava.config import load_recipe
from tinyllava.errors import UserError
from tinyllava.factory import Factory

KEYS = split_words("""
    seed model.llm model.connector model.template model.vision_tower model.vision_tower.feature_layer
    model.max_length model stages stages.finetune stages.finetune.trainer stages.finetune.trainer.learning_rate
    stages.finetune.data stages.finetune.data.0.path stages.finetune.data[0].weight stages.finetune.data.7
    stages.finetune.tune.llm stages.x stages.pretrain.validation stages.finetune.global_batch_size
    stages.finetune.max_length eval base a.b.c . .. a. .a model..llm [0] stages[finetune] model[llm]
    stages.finetune.data.-1 model.checkpoint model.add_tokens ${seed} 0 null model.llm.config
    stages.finetune.on_bad_sample stages.finetune.early_stopping stages.finetune.tune
""")
VALUES = split_words("""
    1 -1 1e400 .nan -.inf null [] {} [1,2] {a: b} ${seed} ${a.b} ${oc.env:X} ${model} ${oc.decode:x} ${oc.create:{}}
    ${oc.select:seed} ${resolver:1} ${ } ${${seed}} ${.} ${..} ${oc.env:HOME,${seed}} ??? &a*a *x ' { [ 2020-01-01 ~
    yes 0x10 0o7 1_0 1:30:00 10:10 full frozen mlp2x_gelu mlp99999999x_gelu mlp-1x_gelu ../x a:b : a.b:c .a:b
    os:path builtins:int json:loads sys:nothing é 日本 - @ % ` | > ! !!set{} =
""")
VALUES += ['"']
VALUES += [
    "!!python/object/apply:os.system ['true']",
    "!!binary abc",
    "&a [*a]",
    "&a {b: *a}",
    "? a",
    "<<: 1",
    "<<: [1]",
]
VALUES += ["{lora: {r: 0}}", "{lora: {r: -1}}", "{partial: {last: x}}", "{mlp: {layers: 1e9}}", "{mlp: [1]}", "{1: 2}"]
VALUES += [
    "[{path: 1}]",
    "[{path: x, weight: 0}]",
    "\x00",
    "{a: 1, a: 2}",
    "{[1]: 2}",
    "{{a: 1}: 2}",
    "9" * 5000,
    "[" * 200,
]
VALUES += [
    "!!timestamp 9999-99-99",
    "!!float x",
    "!!int x",
    "!!omap [a]",
    "!!bool x",
    "- 1",
    "0.1.2",
    "{null: 1}",
    "0b",
    "0x",
]
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{chr(ord(name) - 1)}'] * 9)}]\n" for name in "bcdefghi"
)
NAMES = ("quickstart", "quickstart-lora", "phi2-siglip-base", "tinyllama-mof", "custom-finetune", "quickstart-scratch")


def build(folder: Path) -> list[Case]:
    texts = [Factory("recipes").get(name).read_text(encoding="utf-8") for name in NAMES]
    small = "base: quickstart\nseed: 3\nstages.finetune.trainer.learning_rate: 1.0e-4\nmodel:\n  connector: linear\n"
    texts += [small, "base: other.yaml\n", "base: recipe.yaml\n", f"{small}{BOMB}", "5", "[]", "- a", ""]
    trees = [yaml.safe_load(text) for text in texts[: len(NAMES) + 1]]
    names = sorted(
        {step for key in KEYS for step in key.split(".")} | {"path", "lr", "lora", "trainer", "name", "config"}
    )
    load_recipe("quickstart")  # imports what reads training arguments
    path = folder / "recipe.yaml"
    (folder / "other.yaml").write_text("base: quickstart\nstages: {finetune: {data: [{path: a.json}]}}\n")

    def load_bytes(content: bytes) -> None:
        path.write_bytes(content)
        load_recipe(str(path))

    def load_text(input: tuple[str, list[str]]) -> None:
        path.write_text(input[0], encoding="utf-8", errors="surrogatepass")
        check(load_recipe(str(path), input[1]))

    def load_tree(tree: Any) -> None:
        try:
            text = yaml.safe_dump(tree, sort_keys=False)
        except (yaml.YAMLError, UnicodeError, ValueError):
            raise UserError("YAML cannot hold it") from None
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        check(load_recipe(str(path)))

    def override(overrides: list[str]) -> None:
        check(load_recipe("quickstart", overrides))

    def check(recipe: Any) -> None:
        again = folder / "again.yaml"
        again.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(str(again)).to_yaml() == recipe.to_yaml(), "to_yaml does not read back"

    values = st.one_of(st.sampled_from(VALUES), TEXTS)
    overrides = st.builds("{}={}".format, st.one_of(st.sampled_from(KEYS), TEXTS), values)
    overrides = st.one_of(overrides, overrides, edit_texts(["seed=1", "model.connector=mlp2x_gelu"], VALUES))
    snippets = [f"{key}: {value}" for key in KEYS[::5] for value in VALUES[::7]] + VALUES
    names_or_bases = st.one_of(TEXTS, st.sampled_from(["a.yaml", ".", "..", "/", "recipe", "x" * 300, "a\0.yaml"]))
    return [
        Case("recipes: text", st.tuples(edit_texts(texts, snippets), st.lists(overrides, max_size=1)), load_text),
        Case("recipes: bytes", edit_bytes([text.encode() for text in texts]), load_bytes),
        Case("recipes: tree", edit_trees(trees, make_values(names)), load_tree),
        Case("recipes: overrides", st.lists(overrides, min_size=1, max_size=3), override),
        Case("recipes: names", names_or_bases, load_recipe),
    ]
