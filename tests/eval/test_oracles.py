"""Every test vector computed with the official scorers, one test each: see oracles/README.md.

ORACLES=DIR pytest tests/eval/test_oracles.py runs other vectors of the same kinds.
"""

import json
import math

import pytest
from oracle_tools import agree, near, vectors

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import _judge, gqa, mme, mmmu, mmvet, pope, scienceqa, textvqa, vqav2
from tinyllava.eval.score import score_answers

EPS = {"tinyllava_53f12c7(eps=1e-6)": 1e-6, "llava_c121f04": 0.0, "official_RUCAIBox_3df3ba1": 0.0}


# ---- VQAv2, TextVQA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", vectors("vqav2"))
def test_vqav2(vector):
    given, expected = vector["input"], vector["expected"]
    if vector["kind"] == "normalize":
        assert vqav2.normalize(given["prediction"]) == expected["normalized"]
    elif vector["kind"] == "submission_answer":
        assert vqav2.normalize_submission(given["prediction"]) == expected["answer"]
    elif "error" in expected:
        with pytest.raises(UserError):
            vqav2.score(given["prediction"], given["answers"])
    else:
        accuracy = vqav2.score(given["prediction"], given["answers"])
        assert accuracy == near(expected["accuracy"])
        assert vqav2.round_percent([accuracy]) == expected["accuracy_percent_rounded2"]


@pytest.mark.parametrize("vector", vectors("textvqa"))
def test_textvqa(vector):
    given, expected = vector["input"], vector["expected"]
    if vector["kind"] == "normalize":
        assert textvqa.normalize(given["prediction"]) == expected["normalized"]
    elif "error" in expected:
        with pytest.raises(UserError):
            textvqa.score(**given) if vector["kind"] == "score" else textvqa.extract_question(**given)
    elif vector["kind"] == "score":
        assert textvqa.score(**given) == near(expected["accuracy"])
    else:
        assert textvqa.extract_question(given["prompt"]) == expected["question_key"]


# ---- GQA, POPE, MME -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", vectors("gqa"))
def test_gqa(vector):
    given, expected = vector["input"], vector["expected"]
    if vector["kind"] == "score":
        assert gqa.normalize(given["prediction"]) == expected["converted_prediction"]
        assert gqa.score(given["prediction"], given["answer"]) == expected["correct"]
    elif expected.get("error") == "ZeroDivisionError":  # no question belongs to a group
        assert gqa.aggregate(**given)["distribution"] is None
    elif "error" in expected:
        with pytest.raises(UserError):
            gqa.aggregate(**given)
    else:
        found = gqa.aggregate(**given)
        agree(found, expected)
        details = [name for name in found if name.startswith("accuracyPer")]
        assert {name: set(found[name]) for name in details} == {name: set(expected[name]) for name in details}


@pytest.mark.parametrize("vector", vectors("pope"))
def test_pope(vector):
    given, expected = vector["input"], vector["expected"]
    if vector["kind"] == "parse":
        assert pope.parse(given["prediction"]) == expected["answer"]
        return
    for block, scores in expected.items():
        if not given["predictions"]:
            with pytest.raises(UserError):
                pope.aggregate(given["labels"], given["predictions"], EPS[block])
            continue
        found = pope.aggregate(given["labels"], given["predictions"], EPS[block])
        if "error" in scores:  # 0/0 is 0 here
            scores = {"f1_score": 0.0} | {name: 0.0 for name in ("precision", "recall") if found["TP"] == 0}
        agree(found, scores)


@pytest.mark.parametrize("vector", vectors("mme"))
def test_mme(vector):
    given, expected = vector["input"], vector["expected"]
    if vector["kind"] == "parse":
        assert mme.parse(given["prediction"]) == expected["label"]
    elif vector.get("tag") in ("prediction_with_tab", "prediction_with_newline"):  # the official tool breaks
        clean = [(gold, answer.replace("\t", " ").replace("\n", " ")) for gold, answer in given["pairs"]]
        agree(mme.score_task(given["pairs"]), mme.score_task(clean))
    elif vector.get("tag") == "other_both" and "error" in expected:  # depends on scikit-learn's version
        agree(mme.score_task(given["pairs"]), {"acc": 0.0, "acc_plus": 0.0, "score": 0.0})
    elif "error" in expected:
        with pytest.raises(UserError):
            mme.score_task(given["pairs"])
    else:
        agree(mme.score_task(given["pairs"]), expected)


# ---- ScienceQA, MMMU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", vectors("scienceqa"))
def test_scienceqa(vector):
    given, expected = vector["input"], vector["expected"]
    if vector["kind"] == "parse":
        index = scienceqa.parse(given["prediction"], len(given["choices"]))
        assert (-1 if index is None else index) == expected["pred_index"]
        assert (scienceqa.parse_letter(given["prediction"]) or "FAILED") == expected["parsed_answer"]
        assert (index == given["answer"]) == expected["correct"]
    elif vector["kind"] == "build_prompt_chatbot":
        assert scienceqa.build_prompt(given, given["format"]) == (expected["input"], expected["output"])
    elif "error" in expected:  # no picture: the official script divides by zero
        assert scienceqa.aggregate(given["items"])["img_acc"] is None
    else:
        found = scienceqa.aggregate(given["items"])
        agree(found, {name: expected[name] for name in ("total", "correct", "acc")})
        printed = "Total: {total}, Correct: {correct}, Accuracy: {acc:.2f}%, IMG-Accuracy: {img_acc:.2f}%"
        assert printed.format(**found) == expected["printed"]


def json_float(value):
    """NaN and infinities as the vectors spell them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


@pytest.mark.parametrize("vector", vectors("mmmu"))
def test_mmmu(vector):
    given, expected = vector["input"], vector["expected"]
    if vector["kind"] == "parse_multi_choice":
        assert mmmu.parse_choice(**given) == (None if expected["random"] else expected["choice"])
    elif vector["kind"] == "parse_and_eval_open":
        parsed = mmmu.parse_open(given["response"])
        assert {json_float(value) for value in parsed} == set(expected["parsed_sorted"])
        assert mmmu.score_open(parsed, given["answer"]) == expected["correct"]
    elif vector["kind"] == "eval_multi_choice":
        assert mmmu.score_choice(given["parsed_pred"], given["answer"]) == expected["correct"]
    elif vector["kind"] == "get_multi_choice_info":
        assert mmmu.label_options(given["options"]) == (expected["index2ans"], expected["all_choices"])
    else:
        assert mmmu.build_prompt(given) == expected["final_input_prompt"]


# ---- MM-Vet -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", vectors("mmvet"))
def test_mmvet(vector, tmp_path):
    given, expected = vector["input"], vector["expected"]
    if vector["kind"] == "judge_reply":
        judge_reply(given["replies"], expected)
    elif vector["kind"] == "judge_prompt_tail":
        first = _judge.build_judge_prompt(given["question"], given["answer"], given["prediction"])
        assert first == expected["first_call_text_after_preamble"]
        again = _judge.build_judge_prompt(
            given["question"], given["answer"], given["prediction"], "PREAMBLE", retry=True
        )
        assert again == "PREAMBLE" + expected["retry_text_after_preamble"]
        assert expected["max_tokens"] == _judge.JUDGE_MAX_TOKENS
    elif vector["kind"] == "missing_prediction":
        sample = {"imagename": "v1_0.png", "question": "?", "answer": "a", "capability": ["rec"]}
        (tmp_path / "mm-vet.json").write_text(json.dumps({"v1_0": sample}))
        (tmp_path / "answers.json").write_text(json.dumps(given["predictions"]))
        with pytest.raises(UserError, match="1 missing"):
            score_answers("mmvet", tmp_path, tmp_path / "answers.json")
    else:
        for decimals in (1, 10):
            found = mmvet.aggregate(given["capabilities"], given["scores"], given["num_run"], decimals)
            wanted = expected[f"decimal_places_{decimals}"]
            agree(found, {**wanted, "runs": json.loads(wanted["runs"])})
            assert found["per_integration"].keys() == wanted["per_integration"].keys()
            assert found["per_capability"].keys() == wanted["per_capability"].keys()


def judge_reply(replies, expected):
    """Play the scripted replies, the last for ever, and compare grade, calls, temperatures and prompts."""
    calls = []

    def ask(prompt, temperature):
        calls.append((temperature, prompt.endswith("(digit): ")))
        reply = replies[min(len(calls), len(replies)) - 1]
        if reply == "__RATE_LIMIT__":
            raise _judge.RateLimited
        return reply

    grade = _judge.judge(ask, "question", "answer", "prediction", wait=lambda: None)
    if expected["score"] == "NaN":  # taken by the official code, asked again here
        assert _judge.parse_grade("nan") is None
        assert len(calls) > expected["n_calls"]
        return
    assert grade.score == near(expected["score"])
    assert grade.content == expected["saved_content"]
    assert len(calls) == expected["n_calls"]
    assert [temperature for temperature, _ in calls] == expected["temperatures"]
    assert [retry for _, retry in calls] == expected["retry_suffix_used"]
