"""A user's own questions: the default metric, what each metric counts as right, and the errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from oracle_tools import near

from tests.cli_tools import assert_refused, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tests.image_forms import PIXELS, PNG, list_text_forms
from tinyllava.data.images import open_image
from tinyllava.errors import UserError
from tinyllava.eval.ask import to_sample
from tinyllava.eval.benchmarks import build_item, custom, vqav2
from tinyllava.eval.run import check_images
from tinyllava.eval.score import score_answers
from tinyllava.infer.prompts import make_image_key

ANIMALS = ("a cat", "a dog", "an owl")


def write(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def records() -> list[dict]:
    """One question for each metric. No record names its metric."""
    return [
        {"question_id": "e", "image": "a.png", "text": "What?", "answer": "cat", "accept": ["kitten"], "category": "x"},
        {"question_id": "c", "image": ["a.png", "b.png"], "text": "Which?", "answer": "B", "options": list(ANIMALS)},
        {"question_id": "s", "text": "Colour?", "answer": ["red"] * 3 + ["pink"] * 7},
    ]


@pytest.mark.parametrize(
    ("result", "right"),
    [("cat", 1), ("A  Cat.", 1), ("the cat", 1), ("cats", 0), ("", 0), ("a", 0), ("cat dog", 0), ("not a cat", 0)],
)
def test_exact_ignores_case_period_and_article(result: str, right: int) -> None:
    assert custom.score(result, "cat") == right


def test_other_accepted_answers_and_the_letters_of_choices() -> None:
    assert custom.score("Grey.", "gray", accept=("grey",)) == 1.0
    assert custom.score("grey", "gray") == 0.0
    assert custom.score("7.", 7) == 1.0
    for result in ("b", "B.", "(B)", "dog", "A dog"):
        assert custom.score(result, "a dog", "choice", ANIMALS) == 1.0
        assert custom.score(result, "B", "choice", ANIMALS) == 1.0
    for result in ("a", "d", "owl", "c", "", "elk"):
        assert custom.score(result, "a dog", "choice", ANIMALS) == 0.0
    assert custom.score("b", "a", "choice", ("b", "a")) == 0.0  # options that are letters are what they say
    assert custom.score("an owl", "owl") == 1.0 and custom.normalize("a") == "a"


@pytest.mark.parametrize(
    ("result", "parsed"),
    [
        ("Yes", "yes"),
        ("No, it is not", "no"),
        ("there is no dog", "no"),
        ("not sure", None),
        ("noon", None),
        ("", None),
    ],
)
def test_yes_or_no(result: str, parsed: str | None) -> None:
    assert custom.parse(result, "yes-no") == parsed
    assert custom.score(result, "no", "yes-no") == (parsed == "no")


def test_soft_is_the_vqa_score_for_ten_people() -> None:
    for count in range(11):
        people = ["red"] * count + ["blue"] * (10 - count)
        official = vqav2.score("red", [{"answer": a, "answer_id": i} for i, a in enumerate(people)])
        assert custom.score_soft("red", people) == near(official)
    assert custom.score_soft("Red.", ["red"]) == 1.0 and custom.score_soft("blue", ["red"]) == 0.0
    assert custom.score_soft("red", ["red", "blue"]) == 0.5 and custom.score_soft("red", ["red"] * 2) == 1.0
    assert custom.score_soft("red", ["red"] * 3) == 1.0


def test_the_default_metric_depends_on_the_data(tmp_path: Path) -> None:
    asked = custom.Benchmark().questions(write(tmp_path / "my.jsonl", records()))
    assert [question.extra["metric"] for question in asked] == ["exact", "choice", "soft"]
    assert asked[1].images == (str(tmp_path / "a.png"), str(tmp_path / "b.png")) and asked[2].images == ()
    yes_no = [{"question_id": n, "text": "?", "answer": answer} for n, answer in enumerate(("Yes", "no"))]
    assert {q.extra["metric"] for q in custom.Benchmark().questions(write(tmp_path / "b.jsonl", yes_no))} == {"yes-no"}
    mixed = [*yes_no, {"question_id": "m", "text": "?", "answer": "maybe"}]
    assert {q.extra["metric"] for q in custom.Benchmark().questions(write(tmp_path / "c.jsonl", mixed))} == {"exact"}
    mixed[0]["metric"] = "yes-no"
    assert [q.extra["metric"] for q in custom.Benchmark().questions(write(tmp_path / "d.jsonl", mixed))][:2] == [
        "yes-no",
        "exact",
    ]


def test_an_image_has_the_forms_that_records_have(tmp_path: Path) -> None:
    path = tmp_path / "a cat.png"
    path.write_bytes(PNG)
    forms = {"relative": path.name, **list_text_forms(path)}
    lines = [{"question_id": name, "image": form, "text": "?", "answer": "a"} for name, form in forms.items()]
    asked = custom.Benchmark().questions(write(tmp_path / "my.jsonl", lines))
    check_images("my", asked)
    for question in asked:
        (image,) = to_sample(question).images
        assert np.array_equal(open_image(image), PIXELS), question.id
        assert len(build_item(question, "a", "a", 1.0)["image"]) < 300
    assert make_image_key(asked[0].images[0]) == ("file", str(path), *make_image_key(str(path))[2:])
    bare = [{"question_id": "1", "image": [None, ""], "text": "?"}, {"question_id": "2", "image": None, "text": "?"}]
    assert [question.images for question in custom.Benchmark().questions(write(path.parent / "b.jsonl", bare))] == [
        (),
        (),
    ]
    lines[0]["image"] = "https://example.org/a.png"
    assert custom.Benchmark().questions(write(tmp_path / "c.jsonl", lines))[0].images == ("https://example.org/a.png",)
    lines[0]["image"] = {"type": "image", "source": {"type": "base64", "data": "A" * 100_000 + "!"}}
    with pytest.raises(UserError, match=r"d\.jsonl, question relative: image data:.* cannot be read") as error:
        custom.Benchmark().questions(write(tmp_path / "d.jsonl", lines))
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metric": "fuzzy"}, "unknown metric 'fuzzy'. Known: exact, choice, yes-no, soft"),
        ({"metric": "soft"}, "soft needs a list of answers, found 'cat'"),
        ({"metric": "exact", "answer": ["cat"]}, r"exact needs one answer, found \['cat'\]"),
        ({"options": ["dog", "owl"]}, r"its answer 'cat' is not one of \['dog', 'owl'\]"),
        ({"question_id": "c"}, "question_id 'c' occurs twice"),
    ],
)
def test_the_error_names_a_record_that_cannot_be_scored(tmp_path: Path, change: dict, words: str) -> None:
    first, *rest = records()
    with pytest.raises(UserError, match=words):
        custom.Benchmark().questions(write(tmp_path / "my.jsonl", [first | change, *rest]))


@pytest.mark.parametrize("key", ["metric", "answer", "question_id", "image"])
def test_an_error_never_prints_a_long_value(tmp_path: Path, tinyllava, key: str) -> None:
    question = {
        "question_id": 1,
        "text": "q",
        "answer": "a",
        "metric": "x",
        key: "data:image/png;base64," + "*" * 99999,
    }
    path = write(tmp_path / "my.jsonl", [question, question])
    with pytest.raises(UserError) as refused:
        custom.Benchmark().questions(path)
    assert len(str(refused.value)) < 400
    asked = write(tmp_path / "ok.jsonl", [{"question_id": 1, "text": "q", "answer": "a"}])
    answers = write(tmp_path / "a.jsonl", [{"question_id": "9" * 99999, "text": "a"}])
    assert_refused(tinyllava("score", asked, "--answers", answers), "1 unknown")


def test_a_file_is_a_task(tmp_path: Path, tinyllava) -> None:
    path = write(tmp_path / "data" / "my.jsonl", records())
    result = {"e": "Kitten", "c": "(c)", "s": "red"}
    answers = write(tmp_path / "a.jsonl", [{"question_id": qid, "text": text} for qid, text in result.items()])
    out = tmp_path / "out"
    assert tinyllava("score", path, "--answers", answers, "--output", out).code == 0
    entry = json.loads((out / "results.json").read_text())["tasks"]["my"]
    assert entry["score"] == near(100 * (1 + 0 + 0.9) / 3)
    assert entry["metric"] == "exact match, multiple-choice accuracy, soft accuracy"
    assert entry["categories"]["x"]["accuracy"] == 1.0
    assert score_answers("custom", path, answers)["score"] == entry["score"]
    assert_refused(tinyllava("score", tmp_path / "no.jsonl", "--answers", answers), "no.jsonl", "there is no file")
    other = tmp_path / "my.json"
    other.write_bytes(path.read_bytes())
    assert_refused(tinyllava("score", other, "--answers", answers), "my.json is not a task", "ends in .jsonl")
    with pytest.raises(UserError, match=r"is a folder\. Give an answers file\.$"):  # no official tool has a folder
        score_answers("custom", path, tmp_path)
    assert_refused(tinyllava("score", "custom", "--answers", answers), "custom", "--data FILE.jsonl")


def test_questions_without_right_answers_are_asked_but_not_scored(tmp_path: Path) -> None:
    bare = [{key: value for key, value in record.items() if key != "answer"} for record in records()]
    path = write(tmp_path / "my.jsonl", bare)
    answers = write(tmp_path / "a.jsonl", [{"question_id": one["question_id"], "text": "B"} for one in bare])
    actual = score_answers(str(path), None, answers)
    assert actual["score"] is None and [one["parsed"] for one in actual["items"]] == ["b", "dog", "b"]
