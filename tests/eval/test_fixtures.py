"""Whole benchmarks in their official layouts, scored end to end: the aggregates of the official scripts.

Where an official script takes answers that are missing or repeated, we refuse them unless told otherwise.
"""

import json
from pathlib import Path

import pytest
from oracle_tools import ORACLES, agree, near

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import gqa, mmvet
from tinyllava.eval.score import read_answers, score_answers


def fixture(name):
    """The fixture's folder, and what the official scripts made of it."""
    root = ORACLES / f"{name}_fixture"
    if not root.exists():
        pytest.skip(f"no {root}")
    return root, json.loads((root / "expected.json").read_text(encoding="utf-8"))


def refused(*args, words, **options):
    """Strictly, the answers are refused with the counts in `words`."""
    with pytest.raises(UserError) as error:
        score_answers(*args, **options)
    assert words in str(error.value)


def test_vqav2_fixture():
    root, expected = fixture("vqav2")
    for name in ("results.json", "results_duplicate.json"):  # the last answer wins
        found = score_answers("vqav2", root, root / name, allow_partial="duplicate" in name)
        agree(found["metrics"], expected[name]["accuracy"])
        assert found["metrics"]["evalQA"] == expected[name]["evalQA"]
        assert round(found["score"], 2) == expected[name]["accuracy"]["overall"]
    refused("vqav2", root, root / "results_duplicate.json", words="2 duplicate")
    refused("vqav2", root, root / "results_missing.json", words="1 missing")
    refused("vqav2", root, root / "results_extra.json", words="1 unknown")


def test_vqav2_upload_fixture():
    root, _ = fixture("vqav2")
    answers = root / "llava/answers/llava_vqav2_mscoco_test-dev2015/fixture-model/merge.jsonl"
    refused("vqav2", root / "llava", answers, words="1 unknown, 1 broken")
    found = score_answers("vqav2", root / "llava", answers, allow_partial=True)
    assert found["score"] is None
    assert found["files"]["vqav2_upload.json"] == json.loads((root / "llava/expected_submission.json").read_text())


def test_textvqa_fixture():
    root, expected = fixture("textvqa")
    for name in ("complete", "missing", "duplicate"):  # missing: left out of the mean; duplicate: counted twice
        found = score_answers("textvqa", root, root / f"answers/{name}.jsonl", allow_partial=name != "complete")
        agree(found["metrics"], {k: v for k, v in expected[f"answers/{name}.jsonl"].items() if k != "printed"})
        if name == "complete":
            per_question = expected["per_question(complete.jsonl, in file order)"]
            assert [one["score"] for one in found["items"]] == near([one["accuracy"] for one in per_question])
            assert found["metric"] == "TextVQA (OCR)"
        else:
            refused("textvqa", root, root / f"answers/{name}.jsonl", words=name)
    refused("textvqa", root, root / "answers/unknown_image.jsonl", words="1 unknown")


def test_gqa_fixture(tmp_path):
    root, expected = fixture("gqa")
    bare = tmp_path / "gqa"  # the release without its choices
    bare.mkdir()
    (bare / "testdev_balanced_questions.json").write_text((root / "testdev_balanced_questions.json").read_text())
    for name, wanted in expected.items():
        file, _, how = name.partition(" | ")
        data, options = (root if "with choices" in how else bare), {"consistency": "--consistency" in how}
        if "error" in wanted:
            refused(
                "gqa",
                data,
                root / "answers" / file,
                words="missing" if not options["consistency"] else "no prediction",
                **options,
            )
            continue
        found = score_answers("gqa", data, root / "answers" / file, allow_partial="duplicate" in file, **options)
        agree(found["metrics"], wanted["scores"])
        assert found["score"] == near(wanted["scores"]["accuracy"])
    refused("gqa", root, root / "answers/merge_duplicate.jsonl", words="1 duplicate")
    converted = root / "expected_testdev_balanced_predictions.json"  # the official results file is scored just as well
    records, _ = read_answers(root / "answers/merge.jsonl")
    predictions = [{"questionId": r["question_id"], "prediction": gqa.normalize(r["text"])} for r in records]
    assert predictions == json.loads(converted.read_text())
    agree(score_answers("gqa", root, converted)["metrics"], expected["merge.jsonl | with choices file"]["scores"])


def test_pope_fixture():
    root, expected = fixture("pope")
    blocks = expected["answers/complete.jsonl"]
    for name in ("complete", "shuffled"):  # by id, so that the order of the answers does not matter
        for block, eps in (("tinyllava_53f12c7", 1e-6), ("llava_c121f04", 0.0)):
            found = score_answers("pope", root, root / f"answers/{name}.jsonl", eps=eps)
            agree(found["metrics"]["per_category"], blocks[block]["per_category"])
            assert found["metrics"]["mean_f1_score"] == near(blocks[block]["derived_mean_f1_over_categories"])
            assert found["score"] == near(100 * found["metrics"]["mean_f1_score"])
    refused("pope", root, root / "answers/missing_one.jsonl", words="1 missing")
    refused("pope", root, root / "answers/unknown_id.jsonl", words="1 unknown")


def test_mme_fixture():
    root, expected = fixture("mme")
    found = score_answers("mme", root, root / "answers/fixture-model.jsonl")
    agree(found["metrics"], expected["scores"])
    assert found["score"] == expected["scores"]["perception"]
    for path in (root / "expected_eval_tool_results").glob("*.txt"):
        assert found["files"][f"mme_eval_tool/{path.name}"] == path.read_text(encoding="utf-8")


def test_scienceqa_fixture():
    root, expected = fixture("scienceqa")
    for name, wanted in expected.items():
        stem = Path(name).stem
        found = score_answers("scienceqa", root, root / name, allow_partial=stem != "complete")["metrics"]
        assert (found["total"], found["correct"], found["acc"]) == (
            wanted["count"],
            wanted["correct"],
            near(wanted["acc"]),
        )
        assert found["results"] == wanted["results"]
        assert (found["img_correct_by_prompt"], found["img_total_by_prompt"]) == (
            wanted["img_correct"],
            wanted["img_total"],
        )
        printed = {name: f"{value:.2f}" for name, value in found["categories"].items()}
        assert printed == {name: value for name, value in wanted["official_evaluate_acc"].items() if value != "-1"}
        assert found["img_total"] == 16  # a missing answer to a question with a picture stays in the denominator
        if stem != "complete":
            refused("scienceqa", root, root / name, words={"extra_id": "unknown"}.get(stem, stem))


def test_mmmu_fixture():
    root, expected = fixture("mmmu")
    for name in ("total_val_output.json", "total_val_output_missing.json"):
        found = score_answers("mmmu", root, root / name, allow_partial="missing" in name)
        assert found["metrics"] == expected[f"main_eval_only | {name}"]
    refused("mmmu", root, root / "total_val_output_missing.json", words="6 missing")

    found = score_answers("mmmu", root, root / "parse_and_eval_input")
    for subject, wanted in expected["main_parse_and_eval | parse_and_eval_input"].items():
        assert found["metrics"][subject] == {"num": wanted["result"]["num_example"], "acc": wanted["result"]["acc"]}
        for one in (one for one in found["items"] if one["category"] == subject):
            given = wanted["parsed"][one["id"]]
            assert one["parsed"] == given["parsed"] if isinstance(given["parsed"], str) else set(given["parsed"])
            assert one["score"] == (given["judge"] == "Correct")

    wanted = expected["main_parse_and_eval | parse_and_eval_input_unparsable"]
    found = score_answers("mmmu", root, root / "parse_and_eval_input_unparsable")
    assert {subject: found["metrics"][subject]["acc"] for subject in wanted["acc_if_unparsable_wrong"]} == wanted[
        "acc_if_unparsable_wrong"
    ]
    assert found["unparsed"] == len(wanted["unparsable_ids"])
    found = score_answers("mmmu", root, root / "parse_and_eval_input_unparsable", unparsed="random")
    drawn = {one["id"]: one["parsed"] for one in found["items"]}
    for subject, official in wanted["official_seed42"].items():
        assert found["metrics"][subject]["acc"] == official["result"]["acc"]
        assert official["parsed"].items() <= drawn.items()


def test_mmvet_fixture():
    root, expected = fixture("mmvet")
    answers = root / "answers/model.jsonl"
    upload = score_answers("mmvet", root, answers)
    assert upload["score"] is None
    assert upload["files"]["mmvet_upload.json"] == json.loads((root / "expected_results_model.json").read_text())
    found = score_answers("mmvet", root, answers, grades=root / "grades_gpt-4-0613-grade-1runs.json")
    wanted = expected["decimal_places_1"]
    agree(found["metrics"], {**wanted, "runs": json.loads(wanted["runs"])})
    assert found["score"] == near(expected["decimal_places_10"]["total"])
    assert expected["judge_preamble_sha256"] == mmvet.PREAMBLE_SHA256
