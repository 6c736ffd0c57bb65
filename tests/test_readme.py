"""The README's commands and its Python run unchanged, on a small dataset and for a few steps.

The output in it is checked too: the comment in the Python block, and the picture with answers.
"""

import base64
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tinyllava
from tinyllava.config import Recipe, load_recipe
from tinyllava.stamps import prepare_tier

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = "`" * 3


def read_blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language, in order, up to the section on benchmarks (test_docs.py reads those)."""
    return re.findall(rf"{FENCE}{language}\n(.*?){FENCE}", README.split("\n## Evaluation")[0], flags=re.S)


def read_commands() -> list[list[str]]:
    """Return every `tinyllava` command of the README, without its comment."""
    lines = [line for block in read_blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("tinyllava ")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory outside the repository, with a small stamps dataset that stands in for stamps:tiny."""
    folder = tmp_path_factory.mktemp("desk")
    small = prepare_tier(folder, "tiny", scale=0.01)
    (folder / "stamps").symlink_to(small, target_is_directory=True)
    (folder / "my_data.json").write_text((small / "instructions.json").read_text())
    (folder / "my_images").symlink_to(small, target_is_directory=True)
    (folder / "docs").symlink_to(ROOT / "docs", target_is_directory=True)
    return folder


def run_command(command: list[str], desk: Path, typed: str = "") -> str:
    """Run a command in the directory `desk`, with `typed` as its input; return its output and its error output."""
    if command[1] in ("train", "look"):
        stages = {"pretrain": "captions", "finetune": "instructions"}
        command = [*command, *(f"stages.{s}.data=[{{path: stamps/{part}.json}}]" for s, part in stages.items())]
        command += [f"stages.{s}.trainer.max_steps=4" for s in stages]
        command += ["stages.finetune.validation=[{path: stamps/validation.json}]"]
        command += ["stages.finetune.trainer.eval_steps=2", "stages.finetune.trainer.save_steps=2"]
    command = [sys.executable, "-m", "tinyllava", *command[1:]]
    command += ["--data", "stamps"] if "train" in command else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TINYLLAVA_CACHE": str(desk / "cache"), "COLUMNS": "120"}
    done = subprocess.run(command, cwd=desk, input=typed, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_the_readme_runs_from_top_to_bottom(desk: Path) -> None:
    commands = read_commands()
    assert {"train", "look", "chat", "list", "export", "data"} <= {command[1] for command in commands}
    commands.sort(key=lambda command: {"train": 0, "export": 2}.get(command[1], 1))
    shown = {shlex.join(command): run_command(command, desk, typed="What is this?\n") for command in commands}
    table = shown["tinyllava train quickstart"]
    assert "naming" in table and "blind" in table and "tinyllava chat runs/quickstart" in table
    assert "supervised" in shown["tinyllava look quickstart"] and "plain llava" in shown["tinyllava look quickstart"]
    assert (desk / "runs" / "quickstart" / "results.json").is_file()
    for name in ("metrics.jsonl", "curve.png", "final/config.json"):
        assert (desk / "runs" / "quickstart" / "finetune" / name).is_file()
    assert (desk / "runs" / "quickstart" / "eval" / "stamps" / "samples.html").is_file()
    assert shown["tinyllava chat nano docs/stamps.png"].strip()


def test_the_python_prints_the_output_that_the_readme_shows(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = read_blocks("python")
    shown = re.findall(r"# prints: (.+)$", code, flags=re.MULTILINE)
    assert len(shown) == code.count("print(") == 1
    monkeypatch.chdir(desk)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == shown


def test_the_picture_of_answers_shows_what_nano_answers() -> None:
    """Every question and answer in docs/answers.svg, and the image between them, are those of docs/stamps.png."""
    picture = (ROOT / "docs" / "answers.svg").read_text(encoding="utf-8")
    pairs = re.findall(r'class="question"[^>]*>([^<]+)</text><text class="answer"[^>]*>([^<]+)</text>', picture)
    assert len(pairs) == 5
    assert base64.b64encode((ROOT / "docs" / "stamps.png").read_bytes()).decode() in picture
    session = tinyllava.load("nano", device="cpu")
    for question, answer in pairs:
        session.reset()
        assert session.chat(question, str(ROOT / "docs" / "stamps.png")) == answer


def test_the_recipe_in_the_readme_is_valid(tmp_path: Path) -> None:
    (block,) = read_blocks("yaml")
    assert Recipe.model_validate(yaml.safe_load(block))
    path = tmp_path / "my-recipe.yaml"
    path.write_text(block)
    assert list(load_recipe(str(path)).stages) == ["pretrain", "finetune"]


def test_the_first_screen_has_only_what_belongs_there() -> None:
    """One sentence, the three boxes, set-up, Python with its output, answers, four commands: nothing above that."""
    top, rest = README.split("\n---\n")
    assert len(read_blocks("python")[0].split("\n\n", 1)[1].splitlines()) == 2  # and the import
    assert len([line for line in read_blocks("bash")[1].splitlines() if line.startswith("tinyllava")]) == 4
    order = ["docs/boxes.svg", "make demo", "import tinyllava", "# prints: ", "docs/answers.svg", "tinyllava list"]
    places = [top.index(one) for one in order]
    assert places == sorted(places) and top.count("![") == 2 and "#" not in top[2 : places[1]]
    assert "| without the image |" in rest and "blind baseline" in rest
