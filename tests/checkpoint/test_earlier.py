"""Files of an earlier version still work: its checkpoints answer, its interrupted runs resume, its scores compare.

They lie in tests/earlier (README there); expected.json holds what that version answered, scored and logged.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tinyllava as package
from tests.cli_tools import CommandResult, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tinyllava import checkpoint
from tinyllava.checkpoint.adapter import has_adapter
from tinyllava.config import load_recipe
from tinyllava.data.sample import Message, Sample

EARLIER = Path(__file__).parents[1] / "earlier"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())
NAMES = ["full", "lora"]
QUESTION = "What is it?"
PICTURES = [f"data/{number}.png" for number in range(3)]


@pytest.fixture(autouse=True)
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files as the current directory: the recipes name their data relative to it."""
    folder = Path(shutil.copytree(EARLIER, tmp_path / "earlier"))
    monkeypatch.chdir(folder)
    return folder


def ask(picture: str) -> Sample:
    return Sample([Message("user", f"<image>\n{QUESTION}")], [picture])


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_the_fingerprint_that_its_run_recorded(name: str, earlier: Path) -> None:
    recorded = json.loads((earlier / "interrupted" / name / "run.json").read_text())["fingerprint"]
    assert load_recipe(f"{name}.yaml").compute_hash() == recorded == EXPECTED[name]["fingerprint"]


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_answers_as_it_did(name: str) -> None:
    session = package.load(f"interrupted/{name}", device="cpu")
    assert session.path == Path(f"interrupted/{name}/finetune/checkpoint-4")
    assert has_adapter(session.model) == (name == "lora")
    answers = []
    for picture in PICTURES:
        session.reset()
        answers.append(session.chat(QUESTION, picture, max_new_tokens=12))
    assert answers == EXPECTED[name]["chat"]
    (likelihoods,) = session.loglikelihood([ask(PICTURES[0])], [["thing number 0", "Yes."]])
    assert [one.total for one in likelihoods] == pytest.approx(EXPECTED[name]["likelihood"], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_resumes_and_ends_as_an_undisturbed_one(
    name: str, tinyllava: Callable[..., CommandResult], earlier: Path
) -> None:
    expected, run = EXPECTED[name], earlier / "interrupted" / name
    logged = read_lines(run / "finetune" / "metrics.jsonl")
    first_stage = run / "pretrain" / "final" / checkpoint.RECORD
    written = first_stage.stat().st_mtime_ns
    assert not (run / "finetune" / "final").exists() and max(line["step"] for line in logged) > 4

    said = tinyllava("train", f"{name}.yaml", "--output", f"interrupted/{name}")
    assert said.code == 0, said.err
    assert "resuming from checkpoint-4" in said.err and first_stage.stat().st_mtime_ns == written
    lines = read_lines(run / "finetune" / "metrics.jsonl")
    kept = [line for line in logged if line["step"] <= 4]
    assert lines[: len(kept)] == kept  # their times too: no step up to the fourth ran again
    assert [line["step"] for line in lines] == [step for step, *_ in expected["losses"]]
    for line, (step, loss, eval_loss) in zip(lines, expected["losses"], strict=True):
        assert line.get("loss") == (loss and pytest.approx(loss, abs=1e-5)), step
        assert line.get("eval_loss") == (eval_loss and pytest.approx(eval_loss, abs=1e-5)), step
    results = json.loads((run / "results.json").read_text())
    assert results["tasks"]["test"]["score"] == expected["score"]
    answers = sorted(read_lines(run / "eval" / "test" / "answers.jsonl"), key=lambda line: line["id"])
    assert [line["text"] for line in answers] == expected["final_answers"]


def test_scored_runs_still_compare(tinyllava: Callable[..., CommandResult]) -> None:
    said = tinyllava("eval", "--compare", "scored/full", "scored/lora")
    assert said.code == 0, said.err
    assert EXPECTED["compare"].startswith("test: ") and said.out.startswith("test: ")
    for fact in ("0.0 against 0.0", "+0.0 points", "p = 1"):
        assert fact in EXPECTED["compare"] and fact in said.out


def test_a_checkpoint_that_is_not_plain_llava_answers_as_it_did() -> None:
    session = package.load("checkpoints/qformer", device="cpu")
    assert session.record["plain"] is False and "qformer" in session.model.config.connector
    samples = [ask(picture) for picture in PICTURES]
    assert session.generate(samples, max_new_tokens=12) == EXPECTED["qformer"]["chat"]


def test_an_adapter_merges_into_the_same_model(tinyllava: Callable[..., CommandResult], earlier: Path) -> None:
    source, merged = earlier / "interrupted" / "lora", earlier / "merged"
    said = tinyllava("export", source, "--to", "merged", "--output", merged)
    assert said.code == 0, said.err
    assert not list(merged.glob("adapter*"))
    session = package.load(merged, device="cpu")
    assert not has_adapter(session.model)
    (likelihoods,) = session.loglikelihood([ask(PICTURES[0])], [["thing number 0", "Yes."]])
    assert [one.total for one in likelihoods] == pytest.approx(EXPECTED["lora"]["likelihood"], abs=1e-4)
    base = checkpoint.load(source / "finetune" / "checkpoint-4").model.state_dict()
    moved = session.model.state_dict()
    name = "model.language_model.layers.0.self_attn.q_proj"
    assert not torch.equal(moved[f"{name}.weight"], base[f"{name}.base_layer.weight"])
