"""Two models on the same questions: whether they differ, said in a sentence; and what is no comparison."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from oracle_tools import copy_of, near

from tests.cli_tools import assert_refused, command_line  # noqa: F401  (the fixture `tinyllava`)
from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import pope
from tinyllava.eval.compare import compare, mcnemar


def test_mcnemar_is_exact() -> None:
    assert mcnemar(1, 9) == mcnemar(9, 1) == near(2 * (1 + 10) / 2**10)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == near(2 / 2**6)
    assert mcnemar(5000, 5200) == pytest.approx(0.0488, abs=0.0002)  # the normal approximation with continuity


@pytest.fixture
def scored(tinyllava, tmp_path) -> Callable[..., Path]:
    """scored(name, rate): a directory with the scores of answers of which that share is right; `change` a record."""

    def run(name: str, rate: float, change: Callable[[dict], dict] = dict, drop: int = 0, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        questions, answers = [], []
        for number in range(180):
            one = {"question_id": number, "image": f"{number // 3}.png", "text": f"Is it {number}?", "answer": "yes"}
            questions.append(change(one))
            text = "yes" if rng.random() < rate else "no"
            answers.append({"question_id": number, "prompt": questions[-1]["text"], "text": text})
        folder = tmp_path / name
        folder.mkdir()
        for file, records in (("my.jsonl", questions), ("answers.jsonl", answers)):
            (folder / file).write_text("".join(json.dumps(one) + "\n" for one in records[drop:]))
        arguments = ("score", folder / "my.jsonl", "--answers", folder / "answers.jsonl", "--output", folder)
        assert tinyllava(*arguments).code == 0
        return folder

    return run


def test_two_models_that_differ_and_two_that_do_not(scored, tinyllava) -> None:
    weak, strong, like_weak = scored("weak", 0.6), scored("strong", 0.9), scored("like-weak", 0.6, seed=1)
    said = tinyllava("eval", "--compare", weak, strong)
    assert said.code == 0 and said.out.count("\n") == 1
    (found,) = compare(weak, strong)
    assert found.differs and found.difference == near(found.scores[1] - found.scores[0])
    assert found.interval[0] < found.difference < found.interval[1] and found.p < 1e-6
    assert f"my: {strong} is better than {weak}: {found.scores[1]:.1f} against {found.scores[0]:.1f}" in said.out
    assert "exact McNemar: " in said.out and "95 % interval" in said.out
    assert f"{weak} is worse than {strong}" in tinyllava("eval", "--compare", strong, weak).out
    assert f"{like_weak} and {weak} cannot be told apart" in tinyllava("eval", "--compare", weak, like_weak).out
    (same,) = compare(weak, weak / "results.json")
    assert (same.difference, same.p, same.interval, same.differs) == (0.0, 1.0, [0.0, 0.0], False)


def test_right_answers_that_come_in_threes_are_no_180_answers(scored) -> None:
    """McNemar takes questions for independent; a difference on few pictures has to convince the bootstrap too."""
    weak, strong = scored("weak", 1.0), scored("strong", 1.0)
    path = weak / "eval" / "my" / "items.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    wrong = [line | {"score": 0.0} if line["image"].endswith(("/1.png", "/2.png")) else line for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in wrong))
    (found,) = compare(weak, strong)
    assert found.p == near(mcnemar(0, 6)) and found.p < 0.05  # six questions, on two pictures
    assert not found.differs and found.interval[0] == 0.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"change": lambda one: one | {"text": f"Is it really {one['question_id']}?"}}, "not the same prompts: .*180"),
        ({"change": lambda one: one | {"answer": "no"}}, "not the same data: the right answer .*'yes' and 'no'"),
        ({"change": lambda one: one | {"image": "x" + one["image"]}}, "not the same data: the picture .*'0.png'"),
        ({"drop": 3}, "not the same questions: 3 are only in the first, 0 only in the second"),
    ],
)
def test_what_is_not_the_same_is_not_compared(scored, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=f"my: {words}"):
        compare(scored("a", 0.5), scored("b", 0.5, **changes))


def test_aggregates_are_compared_by_pictures(tmp_path, tinyllava) -> None:
    root = copy_of("pope", tmp_path)
    questions = pope.questions(root)
    for name, answer in (("a", lambda q: "yes"), ("b", lambda q: q.answer)):
        lines = [{"question_id": q.question_id, "prompt": q.text, "text": answer(q)} for q in questions]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tinyllava("score", "pope", "--data", tmp_path, "--answers", tmp_path / f"{name}.jsonl")
    a, b = tmp_path / "a.scores", tmp_path / "b.scores"
    said = tinyllava("eval", "--compare", a, b)
    assert f"POPE: {b} is better than {a}: 100.0 against 66.7, +33.3 points" in said.out
    assert "paired bootstrap over " in said.out
    results = json.loads((b / "results.json").read_text())
    results["tasks"]["pope"]["scorer"] = "another"
    (b / "results.json").write_text(json.dumps(results))
    assert_refused(tinyllava("eval", "--compare", a, b), "not the same scorer", "'another'")


def test_what_cannot_be_compared_is_said(scored, tinyllava, tmp_path) -> None:
    a, b = scored("a", 0.5), scored("b", 0.5)
    assert_refused(tinyllava("eval", "--compare", a, tmp_path / "c"), "there is no", "c/results.json")
    assert_refused(tinyllava("eval", "--compare", a, b, "--tasks", "pope"), "pope is not in both", "my")
    assert_refused(tinyllava("eval"), "CHECKPOINT --tasks", "--compare A B")
    results = json.loads((b / "results.json").read_text())
    (b / "results.json").write_text(json.dumps(results | {"tasks": {"other": results["tasks"]["my"]}}))
    assert_refused(tinyllava("eval", "--compare", a, b), "nothing to compare", "other")
    (b / "results.json").write_text("[]")
    assert_refused(tinyllava("eval", "--compare", a, b), "no results file of ours")
    (b / "results.json").write_text(json.dumps(results))
    (b / "eval" / "my" / "items.jsonl").unlink()
    assert_refused(tinyllava("eval", "--compare", a, b), "items.jsonl", "Score the answers again")
