"""docs/evaluation.md: its commands and tasks exist, and its example questions can be asked."""

import json
import re
import shlex
from pathlib import Path

from tests.test_cli import SURFACE
from tinyllava.eval.benchmarks import custom
from tinyllava.eval.tasks import find_task
from tinyllava.factory import Factory

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def test_its_commands_are_valid() -> None:
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    commands = [line[1:] for line in lines if line[0] == "tinyllava"]
    assert len(commands) >= 7
    for verb, *arguments in commands:
        assert all(one in SURFACE[verb] for one in arguments if one.startswith("--")), arguments
        named = (
            arguments[0]
            if verb == "score"
            else arguments[arguments.index("--tasks") + 1]
            if "--tasks" in arguments
            else ""
        )
        for task in filter(None, named.split(",")):
            assert task == "my.jsonl" or find_task(task)


def test_its_table_names_every_benchmark_and_variant() -> None:
    table = PAGE.partition("## The benchmarks")[2].partition("## Answers files")[0]
    rows = {row[1]: row[0] for row in re.findall(r"^(\| `(\w+)` .*)$", table, flags=re.M)}
    assert set(rows) == set(Factory("benchmarks").list_names()) - {"custom"}
    for name, row in rows.items():
        for variant in re.findall(r"`(-[\w-]+)`", row):
            assert find_task(name + variant).benchmark != Factory("benchmarks").get(name)()
    for name in re.findall(r"`((?:pope|mmmu|textvqa|scienceqa)-[\w-]+)`", PAGE):
        assert find_task(name).benchmark != Factory("benchmarks").get(name.partition("-")[0])()


def test_its_questions_can_be_asked(tmp_path: Path) -> None:
    (example,) = blocks("json")
    (tmp_path / "my.jsonl").write_text(example)
    asked = custom.Benchmark().questions(tmp_path / "my.jsonl")
    assert [question.extra["metric"] for question in asked] == ["exact", "choice", "yes-no", "soft"]
    assert len(asked) == len([json.loads(line) for line in example.splitlines()])
