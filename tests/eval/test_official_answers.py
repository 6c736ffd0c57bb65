"""Answers in the forms of the official tools score as the same answers in our form do."""

import json
from pathlib import Path

import pytest
from oracle_tools import answer_all, copy_of

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question, mme, pope, scienceqa, textvqa
from tinyllava.eval.score import score_answers


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def guess(question: Question) -> str:
    """Some right and some wrong answers, which depend only on the question."""
    return "Yes, it is" if len(question.id) % 2 else "No"


def test_textvqa_by_official_id(tmp_path: Path) -> None:
    root = copy_of("textvqa", tmp_path)
    questions = textvqa.Benchmark().questions(root)
    ours = answer_all(textvqa.Benchmark(), root, tmp_path / "ours.jsonl", lambda q: q.answer[0])
    official = [{"question_id": q.extra["question_id"], "answer": q.answer[0]} for q in questions]
    path = tmp_path / "evalai.json"
    path.write_text(json.dumps(official))
    expected, actual = score_answers("textvqa", root, ours), score_answers("textvqa", root, path)
    assert actual["score"] == expected["score"] > 0 and actual["data"] == expected["data"]
    assert actual["items"] == expected["items"]

    path.write_text(json.dumps([{**official[0], "question_id": str(official[0]["question_id"])}, *official[2:]]))
    with pytest.raises(UserError, match="1 missing"):
        score_answers("textvqa", root, path)
    path.write_text(json.dumps([*official, {"question_id": 99_999_999, "answer": "x"}]))
    with pytest.raises(UserError, match=r"1 unknown \(99999999\)"):
        score_answers("textvqa", root, path)


def test_pope_lines_of_one_category_and_a_folder_of_three(tmp_path: Path) -> None:
    root = copy_of("pope", tmp_path)
    questions = pope.Benchmark().questions(root)
    ours = answer_all(pope.Benchmark(), root, tmp_path / "ours.jsonl", guess)
    expected = score_answers("pope", root, ours)["metrics"]["per_category"]
    folder = tmp_path / "answers"
    folder.mkdir()
    for category in pope.CATEGORIES:
        asked = [q for q in questions if q.category == category]
        lines = [{"question": q.text.split("\n")[0], "answer": guess(q)} for q in asked]
        path = write_lines(folder / f"coco_pope_{category}_answers.json", lines)
        actual = score_answers("pope", root, path)
        assert actual["metrics"]["per_category"] == {category: expected[category]}
        assert actual["metric"] == f"POPE F1, {category} only" and actual["counts"]["missing"] == 0
    assert score_answers("pope", root, folder)["metrics"]["per_category"] == expected
    assert score_answers("pope", root, folder)["metric"] == "POPE F1, mean of the categories"

    mixed = write_lines(tmp_path / "mixed.json", lines[1:] + lines[:1])
    with pytest.raises(UserError, match=rf"has {len(lines)} answers in POPE's own form, .* Give one file for each"):
        score_answers("pope", root, mixed)


def test_mme_folder_of_the_official_tool(tmp_path: Path) -> None:
    root = copy_of("mme", tmp_path)
    ours = answer_all(mme.Benchmark(), root, tmp_path / "ours.jsonl", guess)
    expected = score_answers("mme", root, ours)
    folder = tmp_path / "eval_tool"
    folder.mkdir()
    for name, text in expected["files"].items():
        (folder / Path(name).name).write_text(text.replace(".txt\t", ".jpg\t"), encoding="utf-8")
    actual = score_answers("mme", root, folder)
    assert actual["metrics"] == expected["metrics"] and actual["counts"]["missing"] == 0

    with (folder / "OCR.txt").open("a") as file:
        file.write("another.jpg\tIs it?\tYes\tyes\n")
    with pytest.raises(UserError, match=r"OCR\.txt, line 5: expected image, question, right answer"):
        score_answers("mme", root, folder)


def test_files_of_another_form_are_refused_by_name(tmp_path: Path) -> None:
    root = copy_of("pope", tmp_path)
    label = root / "coco" / "coco_pope_random.json"
    first, *others = label.read_text().splitlines(keepends=True)
    answers = write_lines(tmp_path / "pope.json", [{"question": "Is it?", "answer": "no"}, {}])
    with pytest.raises(UserError, match=r"pope\.json does not have the expected form: no 'question'"):
        score_answers("pope", root, answers)
    for line, words in (
        ('""\n', r"coco_pope_random\.json, line 1 is not a record"),
        ("{}\n", r"data of pope in .* the expected form: no 'image'"),
        (first.replace('"image": "', '"image": ["').replace('.jpg"', '.jpg"]'), "data of pope in"),
        ('{"a":' * 5000 + "\n", "line 1 is not JSON: it is nested too deeply"),
    ):
        label.write_text("".join([line, *others]))
        with pytest.raises(UserError, match=words):
            score_answers("pope", root, answers)

    root = copy_of("mme", tmp_path)
    text = next((root / "MME_Benchmark_release_version" / "OCR").glob("*.txt"))
    text.write_bytes(b"\xff" + text.read_bytes())
    with pytest.raises(UserError, match=r"\.txt is not UTF-8 text"):
        score_answers("mme", root, answers)


def test_scienceqa_results_of_the_official_script(tmp_path: Path) -> None:
    root = copy_of("scienceqa", tmp_path)
    ours = answer_all(scienceqa.Benchmark(), root, tmp_path / "ours.jsonl", lambda q: "AB?"[len(q.id) % 3])
    expected = score_answers("scienceqa", root, ours)
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"acc": 1.0, "results": expected["metrics"]["results"]}))
    actual = score_answers("scienceqa", root, path)
    assert (actual["score"], actual["metrics"]["acc"]) == (expected["score"], expected["metrics"]["acc"])
    texts = {item["id"]: item["answer"] for item in expected["items"]}
    path.write_text(json.dumps({"results": expected["metrics"]["results"], "outputs": texts}))
    assert score_answers("scienceqa", root, path)["metrics"] == expected["metrics"]


def test_a_folder_without_an_official_form_is_refused(tmp_path: Path) -> None:
    root = copy_of("textvqa", tmp_path)
    with pytest.raises(UserError, match=r"is a folder\. Give an answers file"):
        score_answers("textvqa", root, tmp_path)
