"""docs/data.md, tested: its files are written, its commands and its Python run, its recipe reads its data."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.cli_tools import CommandResult, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tinyllava.config import load_recipe
from tinyllava.data import prepare
from tinyllava.data.sources import open_source
from tinyllava.factory import Factory

FENCE = "`" * 3
PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
RECIPES = {"phi2-siglip-base": "llava-1.5", "phi2-siglip-share": "sharegpt4v"}


def test_the_page_from_top_to_bottom(
    tinyllava: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path / "cache"))
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 30), colour).save(f"{colour}.png")
    named = re.findall(rf"^`(\S+)`:\n\n{FENCE}json\n(.*?){FENCE}", PAGE, flags=re.S | re.M)
    named += re.findall(rf"{FENCE}(?:python|yaml)\n# (\S+)\n(.*?){FENCE}", PAGE, flags=re.S)
    for name, text in named:
        Path(name).write_text(text)
    assert {name for name, _ in named} == {
        "my_data.json",
        "my_messages.jsonl",
        "make_table.py",
        "my-data.yaml",
        "my-stream.yaml",
    }
    subprocess.run([sys.executable, "make_table.py"], check=True, capture_output=True)
    for line in re.findall(r"^tinyllava (data check .*)$", PAGE, flags=re.M):
        result = tinyllava(*shlex.split(line, comments=True))
        assert result.code == 0 and "nothing is wrong" in result.out, result
    for line in re.findall(r"^tinyllava (data prepare.*--check.*)$", PAGE, flags=re.M):
        result = tinyllava(*shlex.split(line, comments=True))
        assert result.code == 1 and "missing" in result.out, result
    stage = load_recipe("my-data.yaml").stages["finetune"]
    counts = [len(list(open_source(spec).iterate_samples())) for spec in stage.data]
    assert counts == [3, 2, 1] and stage.on_bad_sample == "skip"
    streams = load_recipe("my-stream.yaml").stages["finetune"]
    assert streams.trainer["max_steps"] == 10000 and all(spec.streaming for spec in streams.data)
    assert [sample.id for sample in open_source(streams.data[2]).iterate_samples()] == ["a", "b"]
    Path("red.png").unlink()
    result = tinyllava("data", "check", "my_table.parquet")  # the pictures are inside
    assert result.code == 0, result
    assert tinyllava("data", "check", "my_data.json", "--images", ".").code == 1


def test_the_trees_on_the_page_are_those_of_the_descriptions_and_of_the_recipes() -> None:
    for name in prepare.list_datasets():
        for item in prepare.load_description(name).items:
            if prepare.load_description(name).kind == "training":
                assert item.path in PAGE, item.path
            elif not item.optional and "*" not in item.path:
                folder, _, rest = item.path.partition("/")
                assert f"`{folder}/`" in PAGE
                assert rest.split("/")[-1] in PAGE or "coco_pope" in rest or "v2_OpenEnded" in rest, item.path
    assert all(f"| {name} |" in PAGE for name in Factory("benchmarks").list_names() if name in prepare.list_datasets())
    for recipe, name in RECIPES.items():
        specs = [spec for stage in load_recipe(recipe).stages.values() for spec in stage.data]
        described = {f"data/{one.path}": f"data/{one.images}" for one in prepare.load_description(name).annotations}
        for spec in specs:
            assert Path(spec.images) == Path(described[spec.path]), spec
