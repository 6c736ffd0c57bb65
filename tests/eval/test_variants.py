"""Names with a variant: splits, prompts and official rules; and the files that test splits leave for a server."""

import json
from pathlib import Path

import pytest
from oracle_tools import answer_all, copy_of, write_mmmu

from tests.cli_tools import assert_refused, command_line  # noqa: F401  (the fixture `tinyllava`)
from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import SHORT_ANSWER, gqa, mmmu, scienceqa, textvqa, vqav2
from tinyllava.eval.tasks import Task, find_task, find_tasks
from tinyllava.factory import Factory


def dump(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_name_says_benchmark_and_options(tmp_path) -> None:
    assert find_task("vqav2-test-dev").options == {"split": "test-dev"}  # not: test, and then dev
    assert find_task("textvqa-test-no-ocr").options == {"split": "test", "ocr": False}
    assert find_task("textvqa-no-ocr-test").options == {"split": "test", "ocr": False}
    assert find_task("pope").options == {} and find_task("pope").title == "POPE"
    assert find_task("textvqa-no-ocr").title == "TextVQA no-ocr"
    for name in ("vqav2-tset", "vqav2-", "vqav2-test-dev-dev"):
        with pytest.raises(UserError, match=r"(vqav2 has no variant|unknown benchmark) 'v?(qav2-)?(tset|dev)?'"):
            find_task(name)
    with pytest.raises(UserError, match=r"no variant 'ocr'\. Known: val, test, no-ocr"):
        find_task("textvqa-ocr")
    with pytest.raises(UserError, match="unknown benchmark 'popee'; did you mean 'pope'"):
        find_task("popee")
    with pytest.raises(UserError, match="unknown benchmark 'mme-val'; did you mean 'mme'"):
        find_task("mme-val")
    mine = dump(tmp_path / "mine.jsonl", {})
    assert (find_task(str(mine)).name, find_task(str(mine)).title) == ("mine", "mine")
    with pytest.raises(UserError, match="two tasks are called 'mine'"):
        find_tasks([str(mine), str(mine)])


def test_every_variant_is_one_that_its_benchmark_takes() -> None:
    """Each option of each variant is a parameter of what it is for."""
    from inspect import signature

    seen = []
    for name in Factory("benchmarks").names():
        benchmark = Factory("benchmarks").get(name)
        if not hasattr(benchmark, "from_short_name"):
            continue
        with pytest.raises(UserError, match="Known: ") as error:
            benchmark.from_short_name(f"{name}-nothing")
        for word in str(error.value).partition("Known: ")[2].rstrip(".").split(", "):
            options = find_task(f"{name}-{word}").options
            taken = {**signature(benchmark.questions).parameters, **signature(benchmark.evaluate).parameters}
            assert options and set(options) <= set(taken), f"{name}-{word}"
            seen.append(f"{name}-{word}")
    assert len(seen) == len(set(seen)) >= 15


def test_a_benchmark_of_ones_own_is_scored_by_the_mean(monkeypatch) -> None:
    monkeypatch.setitem(Factory("benchmarks").registered, "my-own", scienceqa)
    assert find_task("my-own") == Task("my-own", scienceqa)


# -- what they ask -----------------------------------------------------------------------------------------------------


def test_textvqa_without_ocr_is_another_metric(tmp_path, tinyllava) -> None:
    root = copy_of("textvqa", tmp_path)
    task = find_task("textvqa-no-ocr")
    assert all("OCR" not in question.text for question in task.questions(root))
    assert any("OCR" in question.text for question in find_task("textvqa").questions(root))
    lines = [{"question_id": q.question_id, "prompt": q.text, "text": "nokia"} for q in task.questions(root)]
    answers = tmp_path / "a.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tinyllava("score", "textvqa-no-ocr", "--data", tmp_path, "--answers", answers).code == 0
    results = json.loads((tmp_path / "a.scores/results.json").read_text())
    assert results["tasks"]["textvqa-no-ocr"]["metric"] == "TextVQA (no OCR)"


def test_scienceqa_image_and_full(tmp_path) -> None:
    root = copy_of("scienceqa", tmp_path)
    everything, images = (find_task(name).questions(root) for name in ("scienceqa", "scienceqa-image"))
    assert [q.id for q in images] == [q.id for q in everything if q.images] and len(images) < len(everything)
    pairs = [(q, {"text": "A", "prompt": q.text}) for q in everything]
    metrics = find_task("scienceqa").evaluate(root, pairs)
    assert metrics["score"] == metrics["metrics"]["img_acc"] != metrics["metrics"]["acc"]
    full = find_task("scienceqa-full").evaluate(root, pairs)
    assert full["score"] == metrics["metrics"]["acc"] and full["metric"] == "ScienceQA accuracy"
    assert find_task("scienceqa-image").evaluate(root, [p for p in pairs if p[0].images])["score"] == metrics["score"]


def test_gqa_val_reads_its_own_files(tmp_path) -> None:
    root = copy_of("gqa", tmp_path)
    (root / "testdev_balanced_questions.json").rename(root / "val_balanced_questions.json")
    (root / "testdev_balanced_choices.json").rename(root / "val_choices.json")
    task = find_task("gqa-val")
    pairs = [(q, {"text": q.answer}) for q in task.references(root) if q.required]
    found = task.evaluate(root, pairs)
    assert found["score"] == 100.0 and found["metric"] == "GQA val-balanced accuracy"
    assert found["metrics"]["validity"] > 0  # of the choices
    with pytest.raises(UserError, match=r"expected testdev_balanced_questions\.json"):
        gqa.references(root)


def test_mmmu_keeps_the_splits_apart(tmp_path) -> None:
    write_mmmu(tmp_path)
    file = tmp_path / "anns_for_eval.json"
    val = json.loads(file.read_text())
    test = [one | {"id": one["id"].replace("validation", "test"), "answer": "?"} for one in val]
    dump(file, [*test, *val])
    assert [q.id for q in mmmu.questions(tmp_path)] == [one["id"] for one in val]
    assert find_task("mmmu-val").questions(tmp_path) == mmmu.questions(tmp_path)
    assert [q.id for q in find_task("mmmu-test").questions(tmp_path)] == [one["id"] for one in test]
    dump(file, val)
    with pytest.raises(UserError, match="no questions of the test split"):
        find_task("mmmu-test").questions(tmp_path)


# -- files for servers -------------------------------------------------------------------------------------------------


def uploaded(tinyllava, tmp_path: Path, task: str, benchmark: object, name: str, answer: object, **options) -> object:
    """The upload file that `tinyllava score` leaves for answers to all questions."""
    answers = tmp_path / "answers.jsonl"
    lines = [
        {"question_id": q.question_id, "prompt": q.text, "text": answer(q) if callable(answer) else answer}
        for q in benchmark.questions(tmp_path, **options)
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = tinyllava("score", task, "--data", tmp_path, "--answers", answers, "--output", tmp_path / "out")
    assert said.code == 0, said.err
    assert f"{name} is to be uploaded" in said.out
    entry = json.loads((tmp_path / "out/results.json").read_text())["tasks"][task]
    assert entry["score"] is None and entry["interval"] is None
    return json.loads((tmp_path / "out/eval" / task / name).read_text())


def test_vqav2_test_dev_has_a_line_for_every_test_question(tmp_path, tinyllava) -> None:
    for split, ids in (("test-dev2015", (4, 1)), ("test2015", (1, 2, 4))):
        questions = [{"question_id": qid, "image_id": qid, "question": "What?"} for qid in ids]
        dump(tmp_path / f"vqav2/v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
    said = uploaded(tinyllava, tmp_path, "vqav2-test-dev", vqav2, "vqav2_upload.json", "Two dogs.", split="test-dev")
    blank, answer = {"answer": ""}, {"answer": "2 dogs"}
    assert said == [{"question_id": 1, **answer}, {"question_id": 2, **blank}, {"question_id": 4, **answer}]


def test_textvqa_test_goes_by_question_ids(tmp_path, tinyllava) -> None:
    data = [{"question": f"Q{n}?", "question_id": 70 + n, "image_id": "f0", "set_name": "test"} for n in range(2)]
    dump(tmp_path / "textvqa/TextVQA_0.5.1_test.json", {"data": data})
    options = {"split": "test", "ocr": False}
    said = uploaded(tinyllava, tmp_path, "textvqa-test-no-ocr", textvqa, "textvqa_upload.json", "The Sony!", **options)
    assert said == [{"question_id": 70, "answer": "sony"}, {"question_id": 71, "answer": "sony"}]
    assert textvqa.questions(tmp_path, **options)[0].text == f"Q0?\n{SHORT_ANSWER}"


def test_mmmu_test_is_letters_and_words_by_id(tmp_path, tinyllava) -> None:
    (tmp_path / "MMMU").mkdir()
    write_mmmu(tmp_path / "MMMU")
    file = tmp_path / "MMMU/anns_for_eval.json"
    dump(file, [q | {"id": q["id"].replace("validation", "test"), "answer": "?"} for q in json.loads(file.read_text())])
    said = uploaded(tinyllava, tmp_path, "mmmu-test", mmmu, "mmmu_upload.json", lambda q: "(B) it's" * bool(q.images))
    assert said == {"test_Math_1": "B", "test_Art_2": ""}


def test_mmvet_uploads_all_answers(tmp_path, tinyllava) -> None:
    root = copy_of("mmvet", tmp_path)
    benchmark = Factory("benchmarks").get("mmvet")
    answers = answer_all(benchmark, root, tmp_path / "answers.jsonl", "a cat")
    said = tinyllava("score", "mmvet", "--data", tmp_path, "--answers", answers)
    assert "mmvet_upload.json is to be uploaded" in said.out
    upload = json.loads((tmp_path / "answers.scores/eval/mmvet/mmvet_upload.json").read_text())
    assert upload == {question.id: "a cat" for question in benchmark.questions(root)}


# -- what score writes -------------------------------------------------------------------------------------------------


def test_a_results_file_that_is_not_ours_is_left_alone(tmp_path, tinyllava) -> None:
    root = copy_of("vqav2", tmp_path)  # whose answers are called results.json
    score = ("score", "vqav2", "--data", root, "--answers", root / "results.json")
    before = (root / "results.json").read_bytes()
    assert_refused(tinyllava(*score, "--output", root), "results.json is no results file of ours", "--output")
    assert not (root / "eval").exists()
    said = tinyllava(*score)
    assert said.code == 0 and (root / "results.json").read_bytes() == before
    entry = json.loads((root / "results.scores/results.json").read_text())["tasks"]["vqav2"]
    assert entry["score"] == pytest.approx(entry["metrics"]["overall"], abs=0.005)


def test_results_say_how_they_were_made(tmp_path, tinyllava) -> None:
    root = copy_of("pope", tmp_path)
    pope = Factory("benchmarks").get("pope")
    made = {"checkpoint": "c" * 16, "dtype": "float32", "data": "d", "prompts": "p", "decoding": {"temperature": 0.0}}
    folder = tmp_path / "answers"
    folder.mkdir()
    answers = answer_all(pope, root, folder / "answers.jsonl", "no")
    dump(folder / "made_with.json", made)
    assert tinyllava("score", "pope", "--data", root, "--answers", answers).code == 0
    results = json.loads((folder / "answers.scores/results.json").read_text())
    assert results["made_with"] == {"checkpoint": "c" * 16, "dtype": "float32"} and results["versions"]
    entry = results["tasks"]["pope"]
    assert entry["decoding"] == made["decoding"] and entry["scorer"] == pope.SCORER
    assert len(entry["prompts"]) == len(entry["data"]["fingerprint"]) == 16
    assert entry["unparsed"] == 0 and entry["counts"]["missing"] == 0 and entry["interval"][0] <= entry["score"]
    labels = root / "coco/coco_pope_random.json"
    labels.write_text(labels.read_text().replace('"yes"', '"no"'))
    tinyllava("score", "pope", "--data", root, "--answers", answers)
    other = json.loads((folder / "answers.scores/results.json").read_text())["tasks"]["pope"]
    assert other["prompts"] == entry["prompts"] and other["data"]["fingerprint"] != entry["data"]["fingerprint"]
