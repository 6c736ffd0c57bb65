"""The README's commands and Python run as they stand there, on a small dataset and for a few steps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tinyllava.config import Recipe, load_recipe
from tinyllava.data.stamps import prepare

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = "`" * 3


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order, but for those of benchmarks (tests/test_docs.py reads these)."""
    return re.findall(rf"{FENCE}{language}\n(.*?){FENCE}", README.split("\n## Scores")[0], flags=re.S)


def commands() -> list[list[str]]:
    """Every `tinyllava` command of the README, without its comment."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("tinyllava ")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory outside the repository, with a small stamps dataset that stands in for stamps:tiny."""
    folder = tmp_path_factory.mktemp("desk")
    small = prepare(folder, "tiny", scale=0.01)
    (folder / "stamps").symlink_to(small, target_is_directory=True)
    (folder / "my_data.json").write_text((small / "instructions.json").read_text())
    (folder / "my_pictures").symlink_to(small, target_is_directory=True)
    (folder / "docs").symlink_to(ROOT / "docs", target_is_directory=True)
    return folder


def run(command: list[str], desk: Path, said: str = "") -> str:
    """Run a command on the desk; returns what it printed on both streams."""
    if command[1] in ("train", "look"):
        stages = {"pretrain": "captions", "finetune": "instructions"}
        command = [*command, *(f"stages.{s}.data=[{{path: stamps/{part}.json}}]" for s, part in stages.items())]
        command += [f"stages.{s}.trainer.max_steps=4" for s in stages]
        command += ["stages.finetune.validation=[{path: stamps/validation.json}]"]
        command += ["stages.finetune.trainer.eval_steps=2", "stages.finetune.trainer.save_steps=2"]
    command = [sys.executable, "-m", "tinyllava", *command[1:]]
    command += ["--data", "stamps"] if "train" in command else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TINYLLAVA_CACHE": str(desk / "cache"), "COLUMNS": "120"}
    done = subprocess.run(command, cwd=desk, input=said, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_the_readme_runs_from_top_to_bottom(desk: Path) -> None:
    listed = commands()
    assert {"train", "look", "chat", "list", "export", "data"} <= {command[1] for command in listed}
    listed.sort(key=lambda command: {"train": 0, "export": 2}.get(command[1], 1))
    shown = {shlex.join(command): run(command, desk, said="What is this?\n") for command in listed}
    table = shown["tinyllava train quickstart"]
    assert "naming" in table and "blind" in table and "tinyllava chat runs/quickstart" in table
    assert "supervised" in shown["tinyllava look quickstart"] and "plain llava" in shown["tinyllava look quickstart"]
    assert (desk / "runs" / "quickstart" / "results.json").is_file()
    for name in ("metrics.jsonl", "curve.png", "final/config.json"):
        assert (desk / "runs" / "quickstart" / "finetune" / name).is_file()
    assert (desk / "runs" / "quickstart" / "eval" / "stamps" / "samples.html").is_file()
    assert shown["tinyllava chat nano docs/stamps.png"].strip()
    (code,) = blocks("python")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=desk, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_recipe_in_the_readme_is_one(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    assert Recipe.model_validate(yaml.safe_load(block))
    path = tmp_path / "my-recipe.yaml"
    path.write_text(block)
    assert list(load_recipe(str(path)).stages) == ["pretrain", "finetune"]


def test_the_first_screen_is_what_it_should_be() -> None:
    """One sentence, one picture, set-up, three lines of Python, four commands, one table: nothing above that."""
    top = README.split("\n---\n")[0]
    assert len(blocks("python")[0].split("\n\n", 1)[1].splitlines()) == 2  # and the import
    assert len([line for line in blocks("bash")[1].splitlines() if line.startswith("tinyllava")]) == 4
    assert top.count("![") == 1 and top.index("make demo") < top.index("import tinyllava") < top.index("tinyllava list")
    assert "| blind |" in top
