"""The stamps benchmark: how answers are scored, and where the questions are found."""

import json

import pytest

from tinyllava.data.sources import stamps as source
from tinyllava.errors import UserError
from tinyllava.eval.benchmarks.stamps import Benchmark


def write(folder, records) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def record(number: int, answer: str, category: str, **more) -> dict:
    text = {"question_id": number, "image": f"images/{number}.png", "text": "What?", "answer": answer}
    return {**text, "category": category, **more}


stamps = Benchmark()


def test_questions_and_scores_by_category(tmp_path) -> None:
    write(
        tmp_path / "stamps",
        [
            record(0, "cat", "naming", accept=["a kitten"]),
            record(1, "dog", "naming"),
            record(2, "B", "multiple_choice", options=["cat", "dog"]),
            record(3, "yes", "existence", image=None),
        ],
    )
    asked = stamps.questions(tmp_path)
    assert [len(question.images) for question in asked] == [1, 1, 1, 0]
    assert asked[0].images[0] == str(tmp_path / "stamps" / "images" / "0.png")
    said = ["Kitten", "cat", "dog", "Yes."]
    result = stamps.evaluate(tmp_path, [(q, {"text": text}) for q, text in zip(asked, said, strict=True)])
    assert result["score"] == 75.0
    assert result["metrics"]["per_category"] == {
        "naming": {"accuracy": 0.5, "n": 2},
        "multiple_choice": {"accuracy": 1.0, "n": 1},
        "existence": {"accuracy": 1.0, "n": 1},
    }
    assert [item["parsed"] for item in result["items"]] == ["kitten", "cat", "dog", "yes"]
    assert [item["metric"] for item in result["items"]] == ["exact", "exact", "choice", "exact"]


def test_locate_uses_the_root_or_the_training_tier(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(source, "compose_tier", lambda tier, cache: tmp_path / "cache" / tier)
    write(tmp_path / "data" / "stamps", [record(0, "cat", "naming")])
    trained_on = ["my.json", "stamps:small/instructions"]
    assert stamps.locate(tmp_path / "data", trained_on) == tmp_path / "data" / "stamps"
    assert stamps.locate(tmp_path, trained_on) == tmp_path / "cache" / "small"
    assert stamps.locate(None, trained_on) == tmp_path / "cache" / "small"
    assert stamps.locate("stamps:full", trained_on) == tmp_path / "cache" / "full"
    with pytest.raises(
        UserError, match=r"stamps:reading contains no stamps test\. Give --data stamps:tiny \(or small, full\)"
    ):
        stamps.locate("stamps:reading", trained_on)
    with pytest.raises(UserError, match=r"not trained on stamps\. Give --data stamps:tiny"):
        stamps.locate(tmp_path, ["my.json"])
    write(tmp_path / "bad", [{"text": "What?", "answer": "cat"}])
    with pytest.raises(UserError, match="has no 'question_id'"):
        stamps.questions(tmp_path / "bad")
