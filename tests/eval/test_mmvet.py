"""MM-Vet's judge: grading resumes after a kill, failed grades, numpy's rounding. The vectors test the rules."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from oracle_tools import copy_of, with_preamble

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import mmvet
from tinyllava.eval.score import score_answers


def judge(asked: list[str], dies_at: int | None = None, reply: str = "0.5") -> Callable[[str, float], str]:
    """A judge that always gives the same reply, stores its prompts in `asked`, and can be killed."""

    def ask(prompt: str, temperature: float) -> str:
        if len(asked) == dies_at:
            raise KeyboardInterrupt
        asked.append(prompt)
        return reply

    return ask


def test_mmvet_rounds_as_numpy():
    values = [*(k / 20 for k in range(2000)), *np.random.default_rng(0).uniform(0, 100, 500)]
    for decimals in (1, 2, 10):
        assert [mmvet.round_as_numpy(float(v), decimals) for v in values] == [
            float(np.round(v, decimals)) for v in values
        ]
    assert (mmvet.round_as_numpy(47.45, 1), round(47.45, 1)) == (47.4, 47.5)


def test_mmvet_requires_the_official_preamble(tmp_path):
    root = copy_of("mmvet", tmp_path)
    options = {"grades": tmp_path / "g.jsonl", "ask": judge([]), "model": "judge"}
    with pytest.raises(UserError, match=r"mm-vet_evaluator\.py"):
        score_answers("mmvet", root, root / "answers/model.jsonl", **options)
    (root / "mm-vet_evaluator.py").write_text('prompt = """a preamble\n"""\n')
    with pytest.raises(UserError, match="not the official one"):
        score_answers("mmvet", root, root / "answers/model.jsonl", **options)


def test_mmvet_judging_resumes_after_a_kill(tmp_path, monkeypatch):
    root = copy_of("mmvet", tmp_path)
    with_preamble(root, monkeypatch)
    answers, grades, asked = root / "answers/model.jsonl", tmp_path / "grades.jsonl", []

    def score(ask=None):
        return score_answers("mmvet", root, answers, grades=grades, ask=ask, model="judge")

    with pytest.raises(KeyboardInterrupt):
        score(judge(asked, dies_at=7))
    assert len(grades.read_text().splitlines()) == 7
    with pytest.raises(UserError, match="has no grades for"):
        score()
    grades.write_bytes(grades.read_bytes()[:-9])  # the kill came while a line was written
    del asked[6]

    actual = score(judge(asked))
    assert len(asked) == len(set(asked)) == actual["counts"]["questions"]  # none asked twice
    assert asked[0].startswith("a preamble\n\nQuestion 0 about the picture? | cat | Prediction 0.")
    assert (actual["score"], actual["metric"]) == (50.0, "MM-Vet, judged by judge")
    assert score() == actual
    official = tmp_path / "grades.json"
    official.write_text(json.dumps(actual["files"]["mmvet_grades.json"]))
    assert score_answers("mmvet", root, answers, grades=official) == actual

    lines = answers.read_text().splitlines()
    changed = json.loads(lines[0]) | {"text": "Another answer."}
    answers.write_text("\n".join([json.dumps(changed), *lines[1:]]))
    before = len(asked)
    with pytest.raises(UserError, match="has no grades for 1 answers"):
        score()  # a grade of another answer is none
    score(judge(asked, reply="1.0"))
    assert len(asked) == before + 1 and "Another answer." in asked[-1]  # what it depends on has changed
    assert score_answers("mmvet-5-runs", root, answers, grades=grades, ask=judge(asked), model="judge")["score"] > 0
    assert len(asked) == before + 1 + 4 * actual["counts"]["questions"]

    lines = grades.read_text().splitlines()
    grades.write_text("\n".join(["{}", *lines]) + "\n")
    with pytest.raises(UserError, match=r"grades.jsonl, line 1 is not a grade"):
        score(judge(asked))


def test_mmvet_failed_grades_are_counted(tmp_path, monkeypatch):
    root = copy_of("mmvet", tmp_path)
    with_preamble(root, monkeypatch)
    options = {"grades": tmp_path / "g.jsonl", "ask": judge([], reply="no idea"), "model": "judge"}
    actual = score_answers("mmvet", root, root / "answers/model.jsonl", **options)
    assert (actual["score"], actual["unparsed"]) == (0.0, actual["counts"]["questions"])

    replies = iter(["no idea"] * 5 + ["0.9"] + ["0.5"] * 100)  # the sixth reply is a grade that nobody reads
    options = {"grades": tmp_path / "h.jsonl", "ask": lambda prompt, temperature: next(replies), "model": "judge"}
    assert score_answers("mmvet", root, root / "answers/model.jsonl", **options)["unparsed"] == 1
