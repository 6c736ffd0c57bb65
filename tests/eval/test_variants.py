"""Variants of benchmarks: splits, prompts and official rules; and the upload files of test splits."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from oracle_tools import answer_all, copy_of, write_mmmu

from tests.cli_tools import assert_refused, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import SHORT_ANSWER, gqa, mmmu, pope, scienceqa, textvqa, vqav2
from tinyllava.eval.tasks import Task, find_task, find_tasks
from tinyllava.factory import Factory


def dump(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_name_gives_benchmark_and_options(tmp_path) -> None:
    assert asdict(find_task("vqav2-test-dev").benchmark) == {"split": "test-dev"}  # not: test, and then dev
    assert asdict(find_task("textvqa-test-no-ocr").benchmark) == {"split": "test", "ocr": False}
    assert asdict(find_task("textvqa-no-ocr-test").benchmark) == {"split": "test", "ocr": False}
    assert find_task("pope").benchmark == pope.Benchmark() and find_task("pope").title == "POPE"
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


def test_every_variant_sets_declared_options() -> None:
    """Each option of each variant is declared by the benchmark, and differs from the default."""
    seen = []
    for name in Factory("benchmarks").list_names():
        benchmark = Factory("benchmarks").get(name)
        if not benchmark.variants:
            continue
        with pytest.raises(UserError, match="Known: ") as error:
            benchmark.from_short_name(f"{name}-nothing")
        for word in str(error.value).partition("Known: ")[2].rstrip(".").split(", "):
            options = benchmark.from_short_name(f"{name}-{word}")
            assert options and set(options) <= {option.name for option in fields(benchmark)}, f"{name}-{word}"
            assert find_task(f"{name}-{word}").benchmark == benchmark(**options)
            seen.append(f"{name}-{word}")
    assert len(seen) == len(set(seen)) >= 15


def test_an_own_benchmark_is_scored_by_the_mean(monkeypatch) -> None:
    monkeypatch.setitem(Factory("benchmarks").registered, "my-own", scienceqa.Benchmark)
    assert find_task("my-own") == Task("my-own", "ScienceQA", scienceqa.Benchmark())


# -- what they ask -----------------------------------------------------------------------------------------------------


def test_textvqa_without_ocr_has_another_metric(tmp_path, tinyllava) -> None:
    root = copy_of("textvqa", tmp_path)
    task = find_task("textvqa-no-ocr")
    assert all("OCR" not in question.text for question in task.benchmark.questions(root))
    assert any("OCR" in question.text for question in find_task("textvqa").benchmark.questions(root))
    lines = [{"question_id": q.question_id, "prompt": q.text, "text": "nokia"} for q in task.benchmark.questions(root)]
    answers = tmp_path / "a.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tinyllava("score", "textvqa-no-ocr", "--data", tmp_path, "--answers", answers).code == 0
    results = json.loads((tmp_path / "a.scores/results.json").read_text())
    assert results["tasks"]["textvqa-no-ocr"]["metric"] == "TextVQA (no OCR)"


def test_scienceqa_image_and_full(tmp_path) -> None:
    root = copy_of("scienceqa", tmp_path)
    everything, images = (find_task(name).benchmark.questions(root) for name in ("scienceqa", "scienceqa-image"))
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
    pairs = [(q, {"text": q.answer}) for q in task.benchmark.references(root) if q.required]
    actual = task.evaluate(root, pairs)
    assert actual["score"] == 100.0 and actual["metric"] == "GQA val-balanced accuracy"
    assert actual["metrics"]["validity"] > 0  # of the choices
    with pytest.raises(UserError, match=r"expected testdev_balanced_questions\.json"):
        gqa.Benchmark().references(root)


def test_mmmu_keeps_the_splits_apart(tmp_path) -> None:
    write_mmmu(tmp_path)
    file = tmp_path / "anns_for_eval.json"
    val = json.loads(file.read_text())
    test = [one | {"id": one["id"].replace("validation", "test"), "answer": "?"} for one in val]
    dump(file, [*test, *val])
    assert [q.id for q in mmmu.Benchmark().questions(tmp_path)] == [one["id"] for one in val]
    assert find_task("mmmu-val").benchmark.questions(tmp_path) == mmmu.Benchmark().questions(tmp_path)
    assert [q.id for q in find_task("mmmu-test").benchmark.questions(tmp_path)] == [one["id"] for one in test]
    dump(file, val)
    with pytest.raises(UserError, match="no questions of the test split"):
        find_task("mmmu-test").benchmark.questions(tmp_path)


# -- files for servers -------------------------------------------------------------------------------------------------


def uploaded(tinyllava, tmp_path: Path, task: str, benchmark: object, name: str, answer: object, **options) -> object:
    """The content of the upload file that `tinyllava score` writes for answers to all questions."""
    answers = tmp_path / "answers.jsonl"
    lines = [
        {"question_id": q.question_id, "prompt": q.text, "text": answer(q) if callable(answer) else answer}
        for q in benchmark.Benchmark(**options).questions(tmp_path)
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = tinyllava("score", task, "--data", tmp_path, "--answers", answers, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert f"{name} to get a score" in result.out
    entry = json.loads((tmp_path / "out/results.json").read_text())["tasks"][task]
    assert entry["score"] is None and entry["interval"] is None
    return json.loads((tmp_path / "out/eval" / task / name).read_text())


def test_vqav2_test_dev_has_a_line_for_every_test_question(tmp_path, tinyllava) -> None:
    for split, ids in (("test-dev2015", (4, 1)), ("test2015", (1, 2, 4))):
        questions = [{"question_id": qid, "image_id": qid, "question": "What?"} for qid in ids]
        dump(tmp_path / f"vqav2/v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
    result = uploaded(tinyllava, tmp_path, "vqav2-test-dev", vqav2, "vqav2_upload.json", "Two dogs.", split="test-dev")
    blank, answer = {"answer": ""}, {"answer": "2 dogs"}
    assert result == [{"question_id": 1, **answer}, {"question_id": 2, **blank}, {"question_id": 4, **answer}]


def test_the_textvqa_upload_uses_question_ids(tmp_path, tinyllava) -> None:
    data = [{"question": f"Q{n}?", "question_id": 70 + n, "image_id": "f0", "set_name": "test"} for n in range(2)]
    dump(tmp_path / "textvqa/TextVQA_0.5.1_test.json", {"data": data})
    options = {"split": "test", "ocr": False}
    result = uploaded(
        tinyllava, tmp_path, "textvqa-test-no-ocr", textvqa, "textvqa_upload.json", "The Sony!", **options
    )
    assert result == [{"question_id": 70, "answer": "sony"}, {"question_id": 71, "answer": "sony"}]
    assert textvqa.Benchmark(**options).questions(tmp_path)[0].text == f"Q0?\n{SHORT_ANSWER}"


def test_the_mmmu_upload_has_letters_and_texts_by_id(tmp_path, tinyllava) -> None:
    (tmp_path / "MMMU").mkdir()
    write_mmmu(tmp_path / "MMMU")
    file = tmp_path / "MMMU/anns_for_eval.json"
    dump(file, [q | {"id": q["id"].replace("validation", "test"), "answer": "?"} for q in json.loads(file.read_text())])
    result = uploaded(tinyllava, tmp_path, "mmmu-test", mmmu, "mmmu_upload.json", lambda q: "(B) it's" * bool(q.images))
    assert result == {"test_Math_1": "B", "test_Art_2": ""}


def test_the_mmvet_upload_has_all_answers(tmp_path, tinyllava) -> None:
    root = copy_of("mmvet", tmp_path)
    benchmark = Factory("benchmarks").get("mmvet")()
    answers = answer_all(benchmark, root, tmp_path / "answers.jsonl", "a cat")
    result = tinyllava("score", "mmvet", "--data", tmp_path, "--answers", answers)
    assert "mmvet_upload.json to get a score" in result.out
    upload = json.loads((tmp_path / "answers.scores/eval/mmvet/mmvet_upload.json").read_text())
    assert upload == {question.id: "a cat" for question in benchmark.questions(root)}


# -- what score writes -------------------------------------------------------------------------------------------------


def test_a_foreign_results_file_is_not_changed(tmp_path, tinyllava) -> None:
    root = copy_of("vqav2", tmp_path)  # whose answers are called results.json
    score = ("score", "vqav2", "--data", root, "--answers", root / "results.json")
    before = (root / "results.json").read_bytes()
    assert_refused(tinyllava(*score, "--output", root), "results.json is not a results file", "--output")
    assert not (root / "eval").exists()
    result = tinyllava(*score)
    assert result.code == 0 and (root / "results.json").read_bytes() == before
    entry = json.loads((root / "results.scores/results.json").read_text())["tasks"]["vqav2"]
    assert entry["score"] == pytest.approx(entry["metrics"]["overall"], abs=0.005)


def test_results_name_their_conditions(tmp_path, tinyllava) -> None:
    root = copy_of("pope", tmp_path)
    benchmark = Factory("benchmarks").get("pope")()
    made = {"checkpoint": "c" * 16, "dtype": "float32", "data": "d", "prompts": "p", "decoding": {"temperature": 0.0}}
    folder = tmp_path / "answers"
    folder.mkdir()
    answers = answer_all(benchmark, root, folder / "answers.jsonl", "no")
    dump(folder / "made_with.json", made)
    assert tinyllava("score", "pope", "--data", root, "--answers", answers).code == 0
    results = json.loads((folder / "answers.scores/results.json").read_text())
    assert results["made_with"] == {"checkpoint": "c" * 16, "dtype": "float32"} and results["versions"]
    entry = results["tasks"]["pope"]
    assert entry["decoding"] == made["decoding"] and entry["scorer"] == benchmark.scorer
    assert len(entry["prompts"]) == len(entry["data"]["fingerprint"]) == 16
    assert entry["unparsed"] == 0 and entry["counts"]["missing"] == 0 and entry["interval"][0] <= entry["score"]
    labels = root / "coco/coco_pope_random.json"
    labels.write_text(labels.read_text().replace('"yes"', '"no"'))
    tinyllava("score", "pope", "--data", root, "--answers", answers)
    other = json.loads((folder / "answers.scores/results.json").read_text())["tasks"]["pope"]
    assert other["prompts"] == entry["prompts"] and other["data"]["fingerprint"] != entry["data"]["fingerprint"]
