"""Score whole benchmarks in their official layouts: `tinyllava score` gives the results of the official scripts.

Some official scripts accept missing or repeated answers. Here they require --allow-partial.
"""

import json
from pathlib import Path

import pytest
from oracle_tools import ORACLES, agree, near

from tests.cli_tools import assert_refused, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tinyllava.eval.benchmarks import _judge, gqa
from tinyllava.eval.score import read_answers_file


def fixture(name):
    """The fixture's folder, and the results of the official scripts for it."""
    root = ORACLES / f"{name}_fixture"
    if not root.exists():
        pytest.skip(f"no {root}")
    return root, json.loads((root / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def score(tinyllava, tmp_path):
    """score(task, root, answers, *options): its entry in results.json, with all `metrics` and `items` that are on disk
    and the `folder` of its files."""

    def run(task, root, answers, *options):
        out = tmp_path / "scores" / str(len(list(tmp_path.glob("scores/*"))))
        result = tinyllava("score", task, "--data", root, "--answers", answers, "--output", out, *options)
        assert result.code == 0, result.err
        (entry,) = json.loads((out / "results.json").read_text())["tasks"].values()
        folder = out / "eval" / task
        with (folder / "items.jsonl").open() as lines:
            items = [json.loads(line) for line in lines]
        return entry | {"metrics": json.loads((folder / "metrics.json").read_text()), "items": items, "folder": folder}

    return run


@pytest.fixture
def refuse(tinyllava, tmp_path):
    """refuse(task, root, answers, words): without --allow-partial, the error has the counts in `words`."""

    def run(task, root, answers, words):
        out = tmp_path / "refused"
        assert_refused(tinyllava("score", task, "--data", root, "--answers", answers, "--output", out), words)
        assert not out.exists()

    return run


def test_vqav2_fixture(score, refuse):
    root, expected = fixture("vqav2")
    for name in ("results.json", "results_duplicate.json"):  # the last answer wins
        actual = score("vqav2", root, root / name, *["--allow-partial"] * ("duplicate" in name))
        agree(actual["metrics"], expected[name]["accuracy"])
        assert actual["metrics"]["evalQA"] == expected[name]["evalQA"]
        assert round(actual["score"], 2) == expected[name]["accuracy"]["overall"]
    assert score("vqav2-val", root, root / "results.json")["score"] == near(
        score("vqav2", root, root / "results.json")["score"]
    )
    refuse("vqav2", root, root / "results_duplicate.json", "2 duplicate")
    refuse("vqav2", root, root / "results_missing.json", "1 missing")
    refuse("vqav2", root, root / "results_extra.json", "1 unknown")


def test_vqav2_upload_fixture(score, refuse):
    root, _ = fixture("vqav2")
    answers = root / "llava/answers/llava_vqav2_mscoco_test-dev2015/fixture-model/merge.jsonl"
    refuse("vqav2", root / "llava", answers, "1 broken")
    actual = score("vqav2", root / "llava", answers, "--allow-partial")
    assert (actual["score"], actual["interval"], actual["categories"]) == (None, None, {})
    upload = (actual["folder"] / "vqav2_upload.json").read_text()
    assert json.loads(upload) == json.loads((root / "llava/expected_submission.json").read_text())


def test_textvqa_fixture(score, refuse):
    root, expected = fixture("textvqa")
    for name in ("complete", "missing", "duplicate"):  # missing: left out of the mean; duplicate: counted twice
        actual = score("textvqa", root, root / f"answers/{name}.jsonl", *["--allow-partial"] * (name != "complete"))
        agree(actual["metrics"], {k: v for k, v in expected[f"answers/{name}.jsonl"].items() if k != "printed"})
        if name == "complete":
            per_question = expected["per_question(complete.jsonl, in file order)"]
            assert [one["score"] for one in actual["items"]] == near([one["accuracy"] for one in per_question])
            assert actual["metric"] == "TextVQA (OCR)"
        else:
            refuse("textvqa", root, root / f"answers/{name}.jsonl", name)
    refuse("textvqa", root, root / "answers/unknown_image.jsonl", "1 unknown")


def test_gqa_fixture(score, refuse, tinyllava, tmp_path):
    root, expected = fixture("gqa")
    bare = tmp_path / "gqa"  # the release without its choices
    bare.mkdir()
    (bare / "testdev_balanced_questions.json").write_text((root / "testdev_balanced_questions.json").read_text())
    for name, wanted in expected.items():
        file, _, how = name.partition(" | ")
        data, task = (root if "with choices" in how else bare), f"gqa{'-consistency' * ('--consistency' in how)}"
        if "error" in wanted:
            refuse(task, data, root / "answers" / file, "missing" if task == "gqa" else "no prediction")
            continue
        actual = score(task, data, root / "answers" / file, *["--allow-partial"] * ("duplicate" in file))
        agree(actual["metrics"], wanted["scores"])
        assert actual["score"] == near(wanted["scores"]["accuracy"])
    refuse("gqa", root, root / "answers/merge_duplicate.jsonl", "1 duplicate")
    converted = root / "expected_testdev_balanced_predictions.json"  # the official results file is scored just as well
    records = read_answers_file(root / "answers/merge.jsonl", gqa.Benchmark(), []).records
    predictions = [{"questionId": r["question_id"], "prediction": gqa.normalize(r["text"])} for r in records]
    assert predictions == json.loads(converted.read_text())
    agree(score("gqa", root, converted)["metrics"], expected["merge.jsonl | with choices file"]["scores"])


def test_pope_fixture(score, refuse):
    root, expected = fixture("pope")
    official = {"tinyllava_53f12c7": "pope-in-order-eps", "llava_c121f04": "pope-in-order"}
    for name, blocks in expected.items():
        for block, task in official.items():
            if "error" in blocks[block]:
                refuse(task, root, root / name, "1 unknown")
                continue
            actual = score(task, root, root / name, *["--allow-partial"] * ("missing" in name))
            agree(actual["metrics"]["per_category"], blocks[block]["per_category"])
            assert actual["metrics"]["mean_f1_score"] == near(blocks[block]["derived_mean_f1_over_categories"])
            assert actual["score"] == near(100 * actual["metrics"]["mean_f1_score"])
    complete = expected["answers/complete.jsonl"]
    for name in ("complete", "shuffled"):  # by id, so that the order of the answers does not matter
        for block, task in (("tinyllava_53f12c7", "pope-eps"), ("llava_c121f04", "pope")):
            actual = score(task, root, root / f"answers/{name}.jsonl")
            agree(actual["metrics"]["per_category"], complete[block]["per_category"])
    refuse("pope", root, root / "answers/missing_one.jsonl", "1 missing")
    refuse("pope", root, root / "answers/unknown_id.jsonl", "1 unknown")


def test_mme_fixture(score):
    root, expected = fixture("mme")
    actual = score("mme", root, root / "answers/fixture-model.jsonl")
    agree(actual["metrics"], expected["scores"])
    assert actual["score"] == expected["scores"]["perception"]
    for path in (root / "expected_eval_tool_results").glob("*.txt"):
        assert (actual["folder"] / "mme_eval_tool" / path.name).read_text() == path.read_text(encoding="utf-8")


def test_scienceqa_fixture(score, refuse):
    root, expected = fixture("scienceqa")
    for name, wanted in expected.items():
        stem = Path(name).stem
        partial = ["--allow-partial"] * (stem != "complete")
        actual = score("scienceqa", root, root / name, *partial)["metrics"]
        assert (actual["total"], actual["correct"]) == (wanted["count"], wanted["correct"])
        assert score("scienceqa-full", root, root / name, *partial)["score"] == near(wanted["acc"])
        assert actual["results"] == wanted["results"]
        assert (actual["img_correct_by_prompt"], actual["img_total_by_prompt"]) == (
            wanted["img_correct"],
            wanted["img_total"],
        )
        printed = {name: f"{value:.2f}" for name, value in actual["categories"].items()}
        assert printed == {name: value for name, value in wanted["official_evaluate_acc"].items() if value != "-1"}
        assert actual["img_total"] == 16  # a missing answer to a question with a picture stays in the denominator
        if stem != "complete":
            refuse("scienceqa", root, root / name, {"extra_id": "unknown"}.get(stem, stem))


def test_mmmu_fixture(score, refuse):
    root, expected = fixture("mmmu")
    for name in ("total_val_output.json", "total_val_output_missing.json"):
        actual = score("mmmu", root, root / name, *["--allow-partial"] * ("missing" in name))
        assert actual["metrics"] == expected[f"main_eval_only | {name}"]
    refuse("mmmu", root, root / "total_val_output_missing.json", "6 missing")

    actual = score("mmmu", root, root / "parse_and_eval_input")
    for subject, wanted in expected["main_parse_and_eval | parse_and_eval_input"].items():
        assert actual["metrics"][subject] == {"num": wanted["result"]["num_example"], "acc": wanted["result"]["acc"]}
        for one in (one for one in actual["items"] if one["category"] == subject):
            given = wanted["parsed"][one["id"]]
            open_answer = isinstance(given["parsed"], list)
            assert one["parsed"] == (sorted(given["parsed"], key=str) if open_answer else given["parsed"])
            assert one["score"] == (given["judge"] == "Correct")

    wanted = expected["main_parse_and_eval | parse_and_eval_input_unparsable"]
    actual = score("mmmu", root, root / "parse_and_eval_input_unparsable")
    assert {subject: actual["metrics"][subject]["acc"] for subject in wanted["acc_if_unparsable_wrong"]} == wanted[
        "acc_if_unparsable_wrong"
    ]
    assert actual["unparsed"] == len(wanted["unparsable_ids"])
    actual = score("mmmu-random", root, root / "parse_and_eval_input_unparsable")
    drawn = {one["id"]: one["parsed"] for one in actual["items"]}
    for subject, official in wanted["official_seed42"].items():
        assert actual["metrics"][subject]["acc"] == official["result"]["acc"]
        assert official["parsed"].items() <= drawn.items()


def test_mmvet_fixture(score):
    root, expected = fixture("mmvet")
    answers = root / "answers/model.jsonl"
    upload = score("mmvet", root, answers)
    assert upload["score"] is None
    converted = json.loads((upload["folder"] / "mmvet_upload.json").read_text())
    assert converted == json.loads((root / "expected_results_model.json").read_text())
    actual = score("mmvet", root, answers, "--judge", root / "grades_gpt-4-0613-grade-1runs.json")
    wanted = expected["decimal_places_1"]
    agree(actual["metrics"], {**wanted, "runs": json.loads(wanted["runs"])})
    assert actual["score"] == near(expected["decimal_places_10"]["total"])
    assert expected["judge_preamble_sha256"] == _judge.PREAMBLE_SHA256
