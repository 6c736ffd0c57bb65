"""docs/training.md: its recipe and its commands are read as they stand there, and its table knows every tuning."""

import re
import shlex
from pathlib import Path

import pytest

from tinyllava.config import load_recipe
from tinyllava.factory import Factory
from tinyllava.train.stage import check_stages

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
FENCE = "`" * 3


def test_every_command_names_a_recipe_and_keys_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(rf"{FENCE}yaml\n# (\S+)\n(.*?){FENCE}", PAGE, flags=re.S):
        Path(name).write_text(text)
    best = load_recipe("best.yaml")
    check_stages(best, best.stages)
    assert best.stages["finetune"].early_stopping.patience == 3
    lines = re.findall(rf"{FENCE}bash\n(.*?){FENCE}", PAGE, flags=re.S)
    commands = [shlex.split(line, comments=True) for block in lines for line in block.splitlines()]
    asked = [words[words.index("train") + 1 :] for words in commands if "train" in words]
    assert len(asked) >= 9
    for recipe, *overrides in asked:
        loaded = load_recipe(recipe, overrides)
        assert loaded.stages["finetune"].tune.llm.tuning == {"lora": {"r": 16, "alpha": 32}}


def test_the_table_has_every_tuning_and_its_options_are_real(tmp_path: Path) -> None:
    rows = re.findall(r"^\| `(.*?)` \|", PAGE, flags=re.M)
    names = {re.match(r"\{?(\w+)", row)[1] for row in rows}
    assert names == set(Factory("tuning").list_names())
    for row in rows:
        load_recipe("quickstart", [f"stages.finetune.tune.llm={row}"])
    pattern = re.search(r"such as\s+`(\".*?\")`", PAGE)[1]
    load_recipe("quickstart", [f"stages.finetune.tune.llm={{lora: {{targets: {pattern}}}}}"])
