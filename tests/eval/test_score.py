"""Answers files: strict matching, torn lines, foreign formats, partial scoring."""

import pytest
from oracle_tools import answer_all, copy_of

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question, pope
from tinyllava.eval.score import match, score_answers


def test_torn_and_foreign_answers(tmp_path):
    root = copy_of("pope", tmp_path)
    answers = answer_all(pope, root, tmp_path / "answers.jsonl", "no")
    whole = answers.read_bytes()
    answers.write_bytes(whole[:-1] + b'\n{"question_id": 30, "text": "caf\xc3')  # killed inside a character
    with pytest.raises(UserError, match=r"1 broken; for example line 31"):
        score_answers("pope", root, answers)
    assert score_answers("pope", root, answers, allow_partial=True)["counts"]["broken"] == 1

    answers.write_bytes(b"")
    with pytest.raises(UserError, match="30 missing"):
        score_answers("pope", root, answers)
    with pytest.raises(UserError, match=r"no answer .* belongs to a question of pope"):
        score_answers("pope", root, answers, allow_partial=True)
    answers.write_text('{"question_id": 0, "text": null}')
    with pytest.raises(UserError, match="needs a question_id and a text"):
        score_answers("pope", root, answers)
    with pytest.raises(UserError, match="no answers file"):
        score_answers("pope", root, tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"no option 'ocr'. It takes: eps"):
        score_answers("pope", root, answers, ocr=False)
    with pytest.raises(UserError, match="did you mean 'pope'"):
        score_answers("popee", root, answers)


def test_partial_answers_are_scored_and_counted(tmp_path):
    root = copy_of("pope", tmp_path)
    answers = answer_all(pope, root, tmp_path / "answers.jsonl", lambda q: q.answer)
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join([*lines[1:], '{"question_id": "x", "text": "no"}\n']))
    found = score_answers("pope", root, answers, allow_partial=True)
    assert found["score"] == 100.0
    assert found["metrics"]["per_category"]["adversarial"]["samples"] == 9
    assert (found["counts"]["missing"], found["counts"]["unknown"]) == (1, 1)


def test_repeated_questions_are_matched_by_their_number():
    """Two questions with one key want two answers; a third counts as a duplicate."""
    twins = [Question(name, 7) for name in ("7", "7 #2")]
    records = [{"question_id": 7, "text": text} for text in ("a", "b", "c")]
    pairs, counts, _ = match(object(), twins, records[:2])
    assert [(q.id, r["text"]) for q, r in pairs] == [("7", "a"), ("7 #2", "b")]
    assert counts["duplicate"] == 0
    assert match(object(), twins, records)[1]["duplicate"] == 1
    assert match(object(), twins, records[:1])[1]["missing"] == 1
