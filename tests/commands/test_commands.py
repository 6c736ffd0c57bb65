"""The commands look, train, data check, chat and export on a tiny recipe."""

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tests.cli_tools import CommandResult, assert_refused, recipe, run_command_line, write_recipe  # noqa: F401  (the fixture `tinyllava`)
from tinyllava.commands.look import look_at_recipe
from tinyllava.config import load_recipe


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, trained by the command line in a separate process."""
    folder = tmp_path_factory.mktemp("run")
    path = write_recipe(folder, recipe(pictures))
    command = [sys.executable, "-m", "tinyllava.cli", "train", path, "--output", folder / "tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Loading weights" not in done.stderr
    assert f"tinyllava chat {folder / 'tiny'}" in done.stdout
    return folder / "tiny"


def test_look_shows_what_will_be_trained_and_writes_nothing(
    tinyllava: Callable[..., CommandResult], tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, recipe(pictures))
    result = tinyllava(
        "look", path, "stages.finetune.trainer.max_steps=-1", "stages.finetune.trainer.num_train_epochs=2"
    )
    assert result.code == 0, result.err
    pretrain, finetune = result.out.split("stage finetune")
    assert "stage pretrain" in pretrain and "optimiser steps  3 (24 samples, 4 per step, max_steps)" in pretrain
    assert "optimiser steps  12 (24 samples, 4 per step, 2 epochs)" in finetune
    assert "lora (r 4, alpha 8)" in finetune and "0.005" in finetune
    assert "image 1: 50x40 -> 32x32 px, 16 tokens" in pretrain and "<image x 16>thing number" in pretrain
    assert "plain llava: loads in transformers without our code" in finetune
    assert "vLLM         no: it does not apply an adapter" in finetune and "export DIR --to merged" in finetune
    assert [child.name for child in tmp_path.iterdir()] == ["tiny.yaml"]


def test_look_says_why_a_checkpoint_is_not_plain(
    tinyllava: Callable[..., CommandResult], tmp_path: Path, pictures: Path
) -> None:
    result = tinyllava("look", write_recipe(tmp_path, recipe(pictures)), "model.connector=mlp3x_gelu")
    assert "not plain llava: the connector mlp3x_gelu is not Llava's two-layer projector" in result.out


def test_turns_that_are_not_learned_are_not_green_and_each_stage_is_checked_as_it_learns(
    tinyllava: Callable[..., CommandResult], tmp_path: Path, pictures: Path
) -> None:
    turns = [("human", "one?"), ("gpt", "first"), ("human", "two?"), ("gpt", "second")]
    turns = [{"from": role, "value": text} for role, text in turns]
    silent = [*turns[:3], {**turns[3], "weight": 0}]  # with `last`, nothing of it is learned
    records = [{"id": f"t{n}", "conversations": turns} for n in range(7)] + [{"id": "silent", "conversations": silent}]
    (tmp_path / "turns.json").write_text(json.dumps(records))
    content = recipe(pictures)
    for stage in content["stages"].values():
        stage.update(data=[{"path": str(tmp_path / "turns.json")}], template="phi", on_bad_sample="skip")
        stage["tune"] = {"llm": "full", "connector": "frozen"}  # no record has an image
    path = write_recipe(tmp_path, content)

    learns_last = "stages.finetune.supervised_turns=last"
    shown = Console(file=io.StringIO(), force_terminal=True, width=200)
    look_at_recipe(load_recipe(str(path), [learns_last]), shown)
    pretrain, finetune = shown.file.getvalue().split("stage finetune")
    assert "only the last turn of each conversation is learned" in finetune and "last turn" not in pretrain
    green = [re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", text) for text in (pretrain, finetune)]
    assert any("first" in piece for piece in green[0]) and any("second" in piece for piece in green[0])
    assert not any("first" in piece for piece in green[1]) and any("second" in piece for piece in green[1])
    assert "nothing_to_learn: " in finetune and "silent" in finetune and "nothing_to_learn" not in pretrain

    assert tinyllava("data", "check", path).code == 0
    path.write_text(path.read_text().replace("  finetune:\n", "  finetune:\n    supervised_turns: last\n"))
    checked = tinyllava("data", "check", path)
    assert checked.code == 1 and "nothing to learn" in checked.out and "silent" in checked.out
    assert_refused(tinyllava("look", path, "stages.finetune.supervised_turns=lst"), "'all' or 'last'", "'lst'")
    assert_refused(tinyllava("look", path, "stages.finetune.supervised_turn=last"), "did you mean 'supervised_turns'")


def test_data_check_exits_with_1_if_anything_is_wrong(
    tinyllava: Callable[..., CommandResult], tmp_path: Path, pictures: Path
) -> None:
    good = tinyllava("data", "check", pictures / "captions.json")
    assert good.code == 0 and "24 records, 24 images" in good.out
    away = tinyllava("data", "check", pictures / "captions.json", "--images", tmp_path)
    assert away.code == 1 and "image not found" in away.out and "c23" not in away.out and "14 more" in away.out

    path = write_recipe(tmp_path, recipe(pictures))
    assert tinyllava("data", "check", path).code == 0
    short = recipe(pictures)
    short["stages"]["pretrain"]["max_length"] = 20  # 16 of them for the picture
    result = tinyllava("data", "check", write_recipe(tmp_path, short))
    assert result.code == 1 and "too long" in result.out  # the recipe's own template and tokenizer count


def test_a_run_writes_log_and_curves_and_is_not_trained_twice(
    tinyllava: Callable[..., CommandResult], trained: Path
) -> None:
    for stage in ("pretrain", "finetune"):
        lines = [json.loads(line) for line in (trained / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
        assert (trained / stage / "curve.png").stat().st_size > 10_000
    assert {"lr/connector", "lr/llm", "grad_norm", "epoch", "time"} <= set(lines[-2])
    again = tinyllava("train", trained.parent / "tiny.yaml", "--output", trained)
    assert again.code == 0 and "stage finetune: already finished" in again.err
    final = trained / "finetune" / "final"
    assert f"vLLM         no: it does not apply an adapter. `tinyllava export {final} --to merged`" in again.out
    assert f"llama.cpp    through `tinyllava export {final} --to split`" in again.out
    other = tinyllava("train", trained.parent / "tiny.yaml", "seed=7", "--output", trained)
    assert_refused(other, "another recipe", "--overwrite")


def test_chat_answers_once_or_each_line(tinyllava: Callable[..., CommandResult], trained: Path, pictures: Path) -> None:
    options = ("--max-new-tokens", 4)
    once = tinyllava("chat", trained, pictures / "1.png", "--prompt", "What is it?", *options)
    assert once.code == 0 and "error" not in once.err and once.out.endswith("\n")
    picture = f"/image {pictures / '1.png'}"
    piped = tinyllava("chat", trained, *options, stdin=f"Say a thing.\n\n/reset\n{picture}\nWhat is it?\n/exit\nmore\n")
    answers = piped.out.splitlines()
    assert piped.code == 0 and len(answers) == 2
    assert answers[1] == once.out.strip()  # after /reset it is the same question
    encoded = base64.b64encode((pictures / "1.png").read_bytes()).decode()
    forms = [(pictures / "1.png").as_uri(), f"data:image/png;base64,{encoded}", encoded.rstrip("=")]
    asked = "".join(f"/image {form}\nWhat is it?\n/reset\n" for form in forms)
    assert tinyllava("chat", trained, *options, stdin=asked).out == once.out * 3
    broken = tinyllava("chat", trained, f"data:image/png;base64,{'A' * 100_000}", stdin="hi\n")
    assert_refused(broken, "data:image/png;base64,A", "(100,022 characters) is not an image")
    assert len(broken.err) < 300
    assert_refused(tinyllava("chat", trained, pictures / "gone.png", stdin="hi\n"), "gone.png", "not found")
    assert_refused(tinyllava("chat", trained, stdin="/imgae x\n"), "/imgae", "did you mean '/image'")


def test_export_merges_the_adapter_and_overwrites_nothing(
    tinyllava: Callable[..., CommandResult], trained: Path, tmp_path: Path, pictures: Path
) -> None:
    merged = tmp_path / "merged"
    result = tinyllava("export", trained, "--to", "merged", "--output", merged)
    assert result.code == 0 and "plain llava" in result.out, result.err
    assert not list(merged.glob("adapter*")) and list((trained / "finetune" / "final").glob("adapter*"))
    ask = (pictures / "2.png", "--prompt", "What is it?", "--max-new-tokens", 6)
    assert tinyllava("chat", merged, *ask).out == tinyllava("chat", trained, *ask).out
    assert_refused(tinyllava("export", trained, "--to", "merged", "--output", merged), "exists already")
    assert_refused(tinyllava("export", merged, "--to", "merged", "--output", tmp_path / "x"), "no adapter")
    assert not (tmp_path / "x").exists()
