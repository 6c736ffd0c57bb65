"""Benchmarks, except for the vectors: the contract, the layouts of files, and the errors."""

import json
import random
import shutil
import subprocess
import sys

import pytest
from oracle_tools import FIXTURES, answer_all, copy_of, near, write_mmmu

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import SHORT_ANSWER, Benchmark, mme, mmmu, pope, scienceqa, textvqa, vqav2
from tinyllava.eval.benchmarks import gqa as gqa_benchmark
from tinyllava.eval.intervals import SumTable
from tinyllava.eval.score import score_answers
from tinyllava.factory import Factory

EIGHT = {"gqa", "mme", "mmmu", "mmvet", "pope", "scienceqa", "textvqa", "vqav2"}
LLAVA_FILES = {
    "gqa": "llava_gqa_testdev_balanced.jsonl",
    "mme": "llava_mme.jsonl",
    "mmvet": "llava-mm-vet.jsonl",
    "pope": "llava_pope_test.jsonl",
    "scienceqa": "llava_test_CQM-A.json",
}


# ---- the contract -------------------------------------------------------------------------------------------------


def test_the_eight_benchmarks_follow_the_contract():
    assert set(Factory("benchmarks").list_names()) >= EIGHT
    for name in EIGHT:
        benchmark = Factory("benchmarks").get(name)
        assert issubclass(benchmark, Benchmark) and benchmark.title and benchmark.folder and benchmark.scorer
        assert benchmark.max_new_tokens in (128, 1024)


def test_benchmarks_are_pure_python():
    code = "import sys, tinyllava.eval.score\nfrom tinyllava.factory import Factory\n"
    code += f"for name in {sorted(EIGHT)}: Factory('benchmarks').get(name)"
    code += "\nprint([name for name in ('torch', 'numpy', 'transformers', 'datasets') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(EIGHT))
def test_answers_to_the_questions_can_be_scored(name, tmp_path):
    """Answers to `questions` match one by one, and `headline` computes the score from the items again."""
    benchmark = Factory("benchmarks").get(name)()
    root = copy_of(name, tmp_path)
    if name == "mmmu":
        write_mmmu(root)
    answers = answer_all(benchmark, tmp_path, tmp_path / "answers.jsonl", "Yes")
    actual = score_answers(name, tmp_path, answers)
    counts = actual["counts"]
    assert counts["answers"] > 1
    assert [counts[k] for k in ("missing", "duplicate", "unknown", "broken")] == [0, 0, 0, 0]
    if actual["score"] is not None:
        assert SumTable(benchmark, actual["items"], ["an image"] * len(actual["items"])).compute_score() == near(
            actual["score"]
        )
    json.dumps({key: value for key, value in actual.items() if key != "files"})  # goes into results.json as it is
    assert len({question.id for question in benchmark.questions(root)}) == counts["answers"]


@pytest.mark.parametrize("name", sorted(LLAVA_FILES))
def test_the_release_alone_has_the_same_questions_as_llava(name, tmp_path):
    """Without LLaVA's question file, the official release gives the same prompts and right answers."""
    benchmark = Factory("benchmarks").get(name)()
    root = copy_of(name, tmp_path)

    def asked():
        return sorted((q.text, q.images, str(q.answer)) for q in benchmark.questions(root))

    llava = asked()
    (root / LLAVA_FILES[name]).unlink()
    assert asked() == llava
    assert all(not image or image.startswith(str(root)) for _, images, _ in llava for image in images)


@pytest.mark.parametrize("name", sorted(EIGHT))
def test_missing_files_are_named(name, tmp_path):
    benchmark = Factory("benchmarks").get(name)()
    with pytest.raises(UserError, match=r"expected .*(json|jsonl|MME_Benchmark_release_version) .*found none"):
        benchmark.questions(tmp_path)
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(UserError, match=r"expected .* in .*found none"):
        score_answers(name, tmp_path, tmp_path / "answers.jsonl")


# ---- one by one ---------------------------------------------------------------------------------------------------


def test_pope_refuses_labels_of_another_release(tmp_path):
    root = copy_of("pope", tmp_path)
    labels = root / "coco/coco_pope_random.json"
    lines = labels.read_text().splitlines(keepends=True)
    labels.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"10 random questions, but the release has 9 labels"):
        pope.Benchmark().questions(root)
    labels.write_text("".join(lines[2:] + lines[:2]))  # as many, of other pictures
    with pytest.raises(UserError, match="different releases of POPE"):
        pope.Benchmark().questions(root)


def test_textvqa_prompts_with_and_without_ocr(tmp_path):
    root = copy_of("textvqa", tmp_path)
    with_ocr = textvqa.Benchmark().questions(root)
    without = textvqa.Benchmark(ocr=False).questions(root)
    assert with_ocr[0].text == f"what brand is this phone?\nReference OCR token: NOKIA, 10:00\n{SHORT_ANSWER}"
    assert without[0].text == f"what brand is this phone?\n{SHORT_ANSWER}"
    answers = answer_all(textvqa.Benchmark(), root, tmp_path / "a.jsonl", "nokia")
    assert score_answers("textvqa", root, answers)["metric"] == "TextVQA (OCR)"
    answers.write_text("".join(line.replace(r"\nReference OCR token: ", r"\n#") for line in answers.open()))
    (root / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    with pytest.raises(UserError, match=r"TextVQA_Rosetta_OCR_v0.2_val.json.*textvqa-no-ocr"):
        textvqa.Benchmark().questions(root)

    tokens = [{"image_id": with_ocr[0].question_id, "ocr_tokens": ["NOKIA", "10:00\nAM"]}]  # a line break in a token
    (root / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps({"data": tokens}))
    made = textvqa.Benchmark().questions(root)
    assert made[0].text == f"what brand is this phone?\nReference OCR token: NOKIA, 10:00 AM\n{SHORT_ANSWER}"
    assert [textvqa.extract_question(q.text) for q in made] == [q.id.split(": ", 1)[1] for q in made]
    assert [q.answer for q in made] == [q.answer for q in with_ocr]
    bare = answer_all(textvqa.Benchmark(), root, tmp_path / "b.jsonl", "nokia").read_text()
    (tmp_path / "b.jsonl").write_text(bare.replace(r"\nReference OCR token: NOKIA, 10:00 AM", ""))
    assert score_answers("textvqa", root, tmp_path / "b.jsonl")["metric"] == "TextVQA (no OCR)"


def test_textvqa_can_ask_the_same_question_twice_about_an_image(tmp_path):
    data = [
        {"question": q, "question_id": i, "image_id": "f0", "answers": ["a"] * 10} for i, q in enumerate(["Q?", "q?"])
    ]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))
    lines = [{"question_id": "f0", "prompt": f"Q?\n{SHORT_ANSWER}", "text": text} for text in ("b", "b")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert score_answers("textvqa", tmp_path, tmp_path / "a.jsonl")["counts"]["duplicate"] == 0


def test_vqav2_percent_rounds_as_python_2():
    assert vqav2.round_percent([1.0] * 497 + [0.0] * 303) == 62.13  # 62.125, where Python 3 says 62.12
    assert round(62.125, 2) == 62.12


def test_vqav2_splits(tmp_path):
    root = copy_of("vqav2", tmp_path)
    assert vqav2.Benchmark().questions(root)[0].images[0].endswith("val2014/COCO_val2014_000000000100.jpg")
    assert vqav2.Benchmark().questions(root / "llava")[0].images[0].endswith("test2015/COCO_test2015_000000000100.jpg")
    assert len(vqav2.Benchmark(split="test").questions(root / "llava")) == 30
    with pytest.raises(UserError, match="unknown VQAv2 split"):
        vqav2.Benchmark(split="train").questions(root)
    (root / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(UserError, match="v2_mscoco_val2014_annotations"):
        vqav2.Benchmark().questions(root)


def test_mme_pairs_by_image_and_accepts_tabs(tmp_path):
    root = copy_of("mme", tmp_path)
    answers = answer_all(mme.Benchmark(), root, tmp_path / "a.jsonl", lambda q: f"{q.answer}\tindeed\n")
    lines = answers.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)  # the official tool would pair lines of different pictures
    answers.write_text("".join(lines))
    actual = score_answers("mme", root, answers)
    assert (actual["metrics"]["perception"], actual["metrics"]["cognition"]) == (2000.0, 800.0)
    assert all(text.count("\t") == 3 * text.count("\n") for text in actual["files"].values())
    shutil.rmtree(root / "MME_Benchmark_release_version/OCR")
    (root / "llava_mme.jsonl").unlink()
    partial = score_answers("mme", root, answers, allow_partial=True)
    assert (partial["metric"], partial["score"]) == ("MME perception (9 of 10 tasks)", 1800.0)


def test_scienceqa_without_images_has_no_img_score():
    item = {"prediction": "A", "choices": ["x", "y"], "answer": 0, "has_image": False}
    actual = scienceqa.aggregate([item, {**item, "prediction": None}])  # a missing answer is wrong
    assert (actual["total"], actual["correct"], actual["acc"]) == (2, 1, 50.0)
    assert (actual["img_total"], actual["img_acc"]) == (0, None)


def test_mmmu_layout_and_upload(tmp_path):
    write_mmmu(tmp_path)
    choice, open_question = mmmu.Benchmark().questions(tmp_path)
    assert choice.text.startswith("Which?\n(A) two\n(B) it's\n\nAnswer with")
    assert choice.images == (str(tmp_path / "all_images/m1.png"),)
    assert (open_question.images, open_question.text) == ((), "How many?")
    answers = tmp_path / "a.json"
    answers.write_text(json.dumps({"validation_Math_1": "(B) it's", "validation_Art_2": "the answer is 1000"}))
    assert score_answers("mmmu", tmp_path, answers)["score"] == 100.0
    file = tmp_path / "anns_for_eval.json"
    file.write_text(file.read_text().replace('"1,000"', '"?"'))
    with pytest.raises(UserError, match=r"no right answer to validation_Art_2.*answer_dict_val.json"):
        mmmu.Benchmark().questions(tmp_path)
    file.write_text(
        file.read_text()
        .replace('"B"}', '"?"}')
        .replace("validation_", "test_")
        .replace('"answer": "B"', '"answer": "?"')
    )
    answers.write_text(json.dumps({"test_Math_1": "(B) it's", "test_Art_2": "so 12"}))
    actual = score_answers("mmmu", tmp_path, answers)
    assert actual["score"] is None
    assert actual["files"]["mmmu_upload.json"] == {"test_Math_1": "B", "test_Art_2": "so 12"}


def test_gqa_limited_to_questions_without_groups():
    """If no question has a group, the distribution is None and all other scores are the same."""
    root = FIXTURES / "gqa_fixture"
    questions = [
        q
        for q in gqa_benchmark.Benchmark().references(root)
        if q.extra["official"]["groups"]["global"] is None and q.required
    ]
    pairs = [(q, {"question_id": q.id, "text": q.answer}) for q in questions]
    actual = gqa_benchmark.Benchmark().evaluate(root, pairs)
    assert (actual["score"], actual["metrics"]["distribution"]) == (100.0, None)
