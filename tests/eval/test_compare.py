"""Compare two models on the same questions: the result in one sentence, and the errors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from oracle_tools import copy_of, near

from tests.cli_tools import assert_refused, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import pope
from tinyllava.eval.compare import compare_runs, compute_mcnemar


def test_mcnemar_is_exact() -> None:
    assert compute_mcnemar(1, 9) == compute_mcnemar(9, 1) == near(2 * (1 + 10) / 2**10)
    assert compute_mcnemar(0, 0) == compute_mcnemar(5, 5) == 1.0
    assert compute_mcnemar(0, 6) == near(2 / 2**6)
    assert compute_mcnemar(5000, 5200) == pytest.approx(0.0488, abs=0.0002)  # the normal approximation with continuity


@pytest.fixture
def scored(tinyllava, tmp_path) -> Callable[..., Path]:
    """scored(name, rate): a directory with scores, of which the share `rate` is right. `change` changes the records."""

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


def test_a_difference_is_found_and_no_difference_too(scored, tinyllava) -> None:
    weak, strong, like_weak = scored("weak", 0.6), scored("strong", 0.9), scored("like-weak", 0.6, seed=1)
    result = tinyllava("eval", "--compare", weak, strong)
    assert result.code == 0 and result.out.count("\n") == 1
    (actual,) = compare_runs(weak, strong)
    assert actual.differs and actual.difference == near(actual.scores[1] - actual.scores[0])
    assert actual.interval[0] < actual.difference < actual.interval[1] and actual.p < 1e-6
    assert f"my: {strong} is better than {weak}: {actual.scores[1]:.1f} against {actual.scores[0]:.1f}" in result.out
    assert "exact McNemar: " in result.out and "95 % interval" in result.out
    assert f"{weak} is worse than {strong}" in tinyllava("eval", "--compare", strong, weak).out
    assert f"{like_weak} and {weak} do not differ significantly" in tinyllava("eval", "--compare", weak, like_weak).out
    (same,) = compare_runs(weak, weak / "results.json")
    assert (same.difference, same.p, same.interval, same.differs) == (0.0, 1.0, [0.0, 0.0], False)


def test_a_difference_on_two_images_is_not_significant(scored) -> None:
    """McNemar assumes independent questions, so the bootstrap over images must also show a difference."""
    weak, strong = scored("weak", 1.0), scored("strong", 1.0)
    path = weak / "eval" / "my" / "items.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    wrong = [line | {"score": 0.0} if line["image"].endswith(("/1.png", "/2.png")) else line for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in wrong))
    (actual,) = compare_runs(weak, strong)
    assert actual.p == near(compute_mcnemar(0, 6)) and actual.p < 0.05  # six questions, on two pictures
    assert not actual.differs and actual.interval[0] == 0.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"change": lambda one: one | {"text": f"Is it really {one['question_id']}?"}}, "not the same prompts: .*180"),
        ({"change": lambda one: one | {"answer": "no"}}, "not the same data: the right answer .*'yes' and 'no'"),
        ({"change": lambda one: one | {"image": "x" + one["image"]}}, "not the same data: the image .*'0.png'"),
        ({"drop": 3}, "not the same questions: 3 are only in the first, 0 only in the second"),
    ],
)
def test_different_questions_or_data_are_refused(scored, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=f"my: {words}"):
        compare_runs(scored("a", 0.5), scored("b", 0.5, **changes))


def test_other_scores_are_compared_by_a_bootstrap_over_images(tmp_path, tinyllava) -> None:
    root = copy_of("pope", tmp_path)
    questions = pope.Benchmark().questions(root)
    for name, answer in (("a", lambda q: "yes"), ("b", lambda q: q.answer)):
        lines = [{"question_id": q.question_id, "prompt": q.text, "text": answer(q)} for q in questions]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tinyllava("score", "pope", "--data", tmp_path, "--answers", tmp_path / f"{name}.jsonl")
    a, b = tmp_path / "a.scores", tmp_path / "b.scores"
    result = tinyllava("eval", "--compare", a, b)
    assert f"POPE: {b} is better than {a}: 100.0 against 66.7, +33.3 points" in result.out
    assert "paired bootstrap over " in result.out
    results = json.loads((b / "results.json").read_text())
    results["tasks"]["pope"]["scorer"] = "another"
    (b / "results.json").write_text(json.dumps(results))
    assert_refused(tinyllava("eval", "--compare", a, b), "not the same scorer", "'another'")


def test_errors_say_why_two_runs_cannot_be_compared(scored, tinyllava, tmp_path) -> None:
    a, b = scored("a", 0.5), scored("b", 0.5)
    assert_refused(tinyllava("eval", "--compare", a, tmp_path / "c"), "there is no", "c/results.json")
    assert_refused(tinyllava("eval", "--compare", a, b, "--tasks", "pope"), "pope is not scored in both", "my")
    assert_refused(tinyllava("eval"), "CHECKPOINT --tasks", "--compare A B")
    results = json.loads((b / "results.json").read_text())
    (b / "results.json").write_text(json.dumps(results | {"tasks": {"other": results["tasks"]["my"]}}))
    assert_refused(tinyllava("eval", "--compare", a, b), "nothing to compare", "other")
    (b / "results.json").write_text("[]")
    assert_refused(tinyllava("eval", "--compare", a, b), "not a results file")
    for change in ({"data": 5}, {"metric": []}, {"scorer": None}):
        tasks = {"my": {**results["tasks"]["my"], **change}}
        (b / "results.json").write_text(json.dumps({**results, "tasks": tasks}))
        assert_refused(tinyllava("eval", "--compare", b, a), "my")
    (b / "results.json").write_text(json.dumps(results))
    items = b / "eval" / "my" / "items.jsonl"
    whole = items.read_text()
    first, *others = whole.splitlines(keepends=True)
    for change in ({"score": "x"}, {"image": 5}, {"id": []}, {"gold": 7}, {"prompt": None}):
        items.write_text("".join([json.dumps(json.loads(first) | change) + "\n", *others]))
        assert_refused(tinyllava("eval", "--compare", b, a), "my")
    for line in ("5\n", "{}\n", "[" * 5000 + "\n"):
        items.write_text("".join([line, *others]))
        assert_refused(tinyllava("eval", "--compare", b, a), "my")
    items.write_text(whole)
    (b / "eval" / "my" / "items.jsonl").unlink()
    assert_refused(tinyllava("eval", "--compare", a, b), "items.jsonl", "Score the answers again")
