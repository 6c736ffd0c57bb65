"""Helpers for the tests of evaluation.

The vectors are in oracles/, whose README says how they were made. ORACLES=DIR uses other vectors of the same kinds.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from tinyllava.eval.benchmarks import _judge
from tinyllava.factory import Factory

FIXTURES = Path(__file__).parent / "oracles"
ORACLES = Path(os.environ.get("ORACLES") or FIXTURES)


def vectors(name):
    """One pytest parameter for each line of NAME.jsonl."""
    path = ORACLES / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    actual = [json.loads(line) for line in lines if line.strip()]
    return [pytest.param(v, id="-".join(part for part in (v["id"], v.get("tag")) if part)) for v in actual]


def near(value):
    return pytest.approx(value, abs=1e-9, rel=0)


def agree(actual, expected):
    """`expected`, floats within 1e-9, is what `found` says of the same keys."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            agree(actual[name], value)
    elif isinstance(expected, float):
        assert actual == near(expected)
    else:
        assert actual == expected


def copy_of(name, tmp_path):
    """Copy a fixture's files to ROOT/eval/FOLDER, where a test may change them."""
    folder = tmp_path / "eval" / Factory("benchmarks").get(name).folder
    shutil.copytree(FIXTURES / f"{name}_fixture", folder)
    return folder


def with_preamble(root, monkeypatch):
    """Write an evaluator with another preamble and accept its hash: MM-Vet's own is third-party text."""
    (root / "mm-vet_evaluator.py").write_text('prompt = """a preamble\n"""\n')
    monkeypatch.setattr(_judge, "PREAMBLE_SHA256", hashlib.sha256(b"a preamble\n").hexdigest())


def write_mmmu(root):
    """Write two questions in TinyLLaVA's layout: a choice with an image, and an open one without."""
    (root / "anns_for_eval.json").write_text(
        json.dumps(
            [
                {
                    "id": "validation_Math_1",
                    "question": "Which?",
                    "options": "['two', \"it's\"]",
                    "question_type": "multiple-choice",
                    "image": "m1.png",
                    "all_choices": ["A", "B"],
                    "index2ans": {"A": "two", "B": "it's"},
                    "answer": "B",
                },
                {"id": "validation_Art_2", "prompt": "How many?", "question_type": "open", "answer": "1,000"},
            ]
        )
    )


def answer_all(benchmark, root, path, answer):
    """Write an answers file as `tinyllava eval` does."""
    lines = [
        {"question_id": q.question_id, "prompt": q.text, "text": answer(q) if callable(answer) else answer}
        for q in benchmark.questions(root)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
