"""MM-Vet's judge: grading that resumes, failed grades, numpy's rounding. The rules themselves are in the vectors."""

import hashlib
import json

import numpy as np
import pytest
from oracle_tools import copy_of

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import _judge, mmvet
from tinyllava.eval.score import score_answers


def test_mmvet_rounds_as_numpy():
    values = [*(k / 20 for k in range(2000)), *np.random.default_rng(0).uniform(0, 100, 500)]
    for decimals in (1, 2, 10):
        assert [mmvet.rounded(float(v), decimals) for v in values] == [float(np.round(v, decimals)) for v in values]
    assert (mmvet.rounded(47.45, 1), round(47.45, 1)) == (47.4, 47.5)


def test_mmvet_judging_resumes_after_a_kill(tmp_path, monkeypatch):
    root = copy_of("mmvet", tmp_path)
    answers, grades = root / "answers/model.jsonl", tmp_path / "grades.json"
    asked = []

    def dying(prompt, temperature):
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append(prompt)
        return "0.5"

    with pytest.raises(UserError, match=r"mm-vet_evaluator\.py"):  # the preamble is not ours to ship
        score_answers("mmvet", root, answers, grades=grades, ask=dying, model="judge")
    (root / "mm-vet_evaluator.py").write_text('prompt = """a preamble\n"""\n')
    with pytest.raises(UserError, match="not the official one"):
        score_answers("mmvet", root, answers, grades=grades, ask=dying, model="judge")
    monkeypatch.setattr(_judge, "PREAMBLE_SHA256", hashlib.sha256(b"a preamble\n").hexdigest())

    with pytest.raises(KeyboardInterrupt):
        score_answers("mmvet", root, answers, grades=grades, ask=dying, model="judge")
    assert len(json.loads(grades.read_text())) == 7
    with pytest.raises(UserError, match="lacks the grades of"):
        score_answers("mmvet", root, answers, grades=grades)

    def judge(prompt, temperature):
        asked.append(prompt)
        return "0.5"

    found = score_answers("mmvet", root, answers, grades=grades, ask=judge, model="judge")
    assert len(asked) == len(set(asked)) == found["counts"]["questions"]  # none asked twice
    assert asked[0].startswith("a preamble\n\nQuestion 0 about the picture? | cat | Prediction 0.")
    assert (found["score"], found["metric"]) == (50.0, "MM-Vet, judged by judge")
    assert score_answers("mmvet", root, answers, grades=grades) == found


def test_mmvet_failed_grades_are_counted(tmp_path, monkeypatch):
    root = copy_of("mmvet", tmp_path)
    (root / "mm-vet_evaluator.py").write_text('prompt = """p\n"""\n')
    monkeypatch.setattr(_judge, "PREAMBLE_SHA256", hashlib.sha256(b"p\n").hexdigest())
    options = {"grades": tmp_path / "g.json", "ask": lambda prompt, temperature: "no idea", "model": "judge"}
    found = score_answers("mmvet", root, root / "answers/model.jsonl", **options)
    assert (found["score"], found["unparsed"]) == (0.0, found["counts"]["questions"])
