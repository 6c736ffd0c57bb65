"""Answers files: strict matching, incomplete lines, other formats, partial scoring."""

import shutil

import pytest
from oracle_tools import answer_all, copy_of

from tests.cli_tools import assert_refused, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Benchmark, Question, mme, pope
from tinyllava.eval.score import match_answers, score_answers


def test_incomplete_lines_and_other_formats(tmp_path):
    root = copy_of("pope", tmp_path)
    answers = answer_all(pope.Benchmark(), root, tmp_path / "answers.jsonl", "no")
    whole = answers.read_bytes()
    answers.write_bytes(whole[:-1] + b'\n{"question_id": 30, "text": "caf\xc3')  # killed inside a character
    with pytest.raises(UserError, match=r"1 broken \(line 31 is not JSON\)"):
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
    with pytest.raises(UserError, match=r"no option 'ocr'. It takes: eps, in_order"):
        score_answers("pope", root, answers, ocr=False)
    with pytest.raises(UserError, match="did you mean 'pope'"):
        score_answers("popee", root, answers)


def test_errors_have_two_lines(tmp_path, tinyllava):
    root = copy_of("mme", tmp_path)
    answers = answer_all(
        mme.Benchmark(), root, tmp_path / "a.jsonl", lambda q: "\tyes\nit\tis\n" if q.answer == "Yes" else "No\r\n"
    )
    result = tinyllava("score", "mme", "--data", tmp_path, "--answers", answers)  # tabs and newlines
    assert result.code == 0 and "2000.00" in result.out and "cognition 800" in result.out
    score = ("score", "mme", "--data", tmp_path, "--answers", answers)
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join([*lines[:3], "{broken\n", *lines[3:-4], *lines[5:7], lines[-1][:-20]]))
    assert_refused(tinyllava(*score), "4 missing (", ", ...)", "2 duplicate (", "2 broken (line 4 is not JSON, line ")
    assert tinyllava(*score, "--allow-partial").code == 0
    assert "4 missing, 2 duplicate, 2 broken" in tinyllava(*score, "--allow-partial").out.replace(", 0 unknown", "")
    assert_refused(tinyllava("score", "mmee", *score[2:]), "unknown benchmark 'mmee'; did you mean 'mme'")
    assert_refused(tinyllava("score", "mme", *score[4:]), "--data ROOT")
    shutil.rmtree(root / "MME_Benchmark_release_version")
    assert_refused(tinyllava(*score), "expected MME_Benchmark_release_version", f"{tmp_path / 'eval' / 'MME'}")


def test_textvqa_answers_without_prompts_cannot_be_matched(tmp_path):
    root = copy_of("textvqa", tmp_path)
    answers = tmp_path / "a.jsonl"
    answers.write_text('{"question_id": "97b750923ceb3ffd", "text": "nokia"}')
    with pytest.raises(UserError, match=r"a\.jsonl: no question can be found in the TextVQA prompt ''"):
        score_answers("textvqa", root, answers)


def test_partial_answers_are_scored_and_counted(tmp_path):
    root = copy_of("pope", tmp_path)
    answers = answer_all(pope.Benchmark(), root, tmp_path / "answers.jsonl", lambda q: q.answer)
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join([*lines[1:], '{"question_id": "x", "text": "no"}\n']))
    actual = score_answers("pope", root, answers, allow_partial=True)
    assert actual["score"] == 100.0
    assert actual["metrics"]["per_category"]["adversarial"]["samples"] == 9
    assert (actual["counts"]["missing"], actual["counts"]["unknown"]) == (1, 1)


def test_repeated_questions_are_matched_by_their_number():
    """Two questions with the same key need two answers. A third answer is a duplicate."""
    twins = [Question(name, 7) for name in ("7", "7 #2")]
    records = [{"question_id": 7, "text": text} for text in ("a", "b", "c")]
    pairs, counts, _ = match_answers(Benchmark(), twins, records[:2])
    assert [(q.id, r["text"]) for q, r in pairs] == [("7", "a"), ("7 #2", "b")]
    assert counts["duplicate"] == 0
    assert match_answers(Benchmark(), twins, records)[1]["duplicate"] == 1
    assert match_answers(Benchmark(), twins, records[:1])[1]["missing"] == 1
