"""Evaluation from end to end with a tiny model: every benchmark, resuming, the blind baseline, the page, errors."""

import io
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from oracle_tools import copy_of, write_mmmu
from PIL import Image
from rich.console import Console

from tests.cli_tools import assert_refused, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tests.tiny_session import tiny_session
from tinyllava import checkpoint
from tinyllava.data.sample import Message, Sample
from tinyllava.errors import UserError
from tinyllava.eval.answers import read_answers
from tinyllava.eval.ask import pick_evenly, to_sample
from tinyllava.eval.benchmarks import Question
from tinyllava.eval.page import pick_items
from tinyllava.eval.results import tabulate_categories
from tinyllava.eval.run import evaluate_tasks
from tinyllava.eval.score import score_answers
from tinyllava.eval.table import is_above_baselines, print_scores
from tinyllava.factory import Factory
from tinyllava.infer import Session

EIGHT = ("gqa", "mme", "mmmu", "mmvet", "pope", "scienceqa", "textvqa", "vqav2")
COLOURS = {"red": (250, 20, 20), "green": (20, 200, 20), "blue": (30, 30, 250)}


def new_checkpoint(folder: Path, seed: int = 1) -> Path:
    """Save a tiny model and return its directory."""
    made = tiny_session(seed=seed)
    checkpoint.save(made.vlm, folder)
    return folder


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    return Session.load(new_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint"), device="cpu")


@pytest.fixture(scope="module")
def stamps_root(tmp_path_factory):
    """A test in the form of stamps: 20 images with two questions each, and one question without an image."""
    root = tmp_path_factory.mktemp("stamps")
    rng, records = random.Random(0), []
    for number in range(20):
        name = rng.choice(list(COLOURS))
        Image.new("RGB", (48, 48), COLOURS[name]).save(root / f"{number}.png")
        for category, text, answer in (
            ("colour", "What colour <is> it?", name),
            ("existence", "Is there a disc?", "no"),
        ):
            one = {"question_id": f"{category}-{number}", "image": f"{number}.png", "text": text}
            records.append({**one, "answer": answer, "category": category})
    records.append({"question_id": "text", "text": "Say yes.", "answer": "yes", "category": "text"})
    (root / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


def make_pictures(questions) -> None:
    """Write a small image for each question."""
    rng = np.random.default_rng(0)
    for path in sorted({path for question in questions for path in question.images}):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)).save(path, "PNG")


@pytest.mark.parametrize("task", EIGHT)
def test_each_benchmark_is_asked_and_scored(task, session, tmp_path) -> None:
    root = copy_of(task, tmp_path)
    if task == "mmmu":
        write_mmmu(root)
    benchmark = Factory("benchmarks").get(task)()
    asked = benchmark.questions(tmp_path)
    make_pictures(asked)
    results = evaluate_tasks(session, [task], tmp_path, tmp_path / "out", progress=False)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    entry = results["tasks"][task]
    answers = tmp_path / "out" / "eval" / task / "answers.jsonl"
    assert len(answers.read_text().splitlines()) == entry["n"] == len(asked)
    again = score_answers(task, tmp_path, answers)  # what `tinyllava score` makes of the same file
    assert again["score"] == entry["score"] and again["counts"]["missing"] == 0
    assert entry["decoding"]["max_new_tokens"] == benchmark.max_new_tokens
    assert entry["prompt"].endswith("ASSISTANT:") and asked[0].text in entry["prompt"]
    assert "data:image" in (tmp_path / "out" / "eval" / task / "samples.html").read_text()


def test_stamps_has_the_blind_and_majority_baselines(session, stamps_root, tmp_path) -> None:
    results = evaluate_tasks(session, ["stamps"], stamps_root, tmp_path, progress=False)
    table = results["categories"]
    assert list(table) == ["colour", "existence", "text"]
    assert [row["n"] for row in table.values()] == [20, 20, 1]
    assert table["existence"]["majority"] == 1.0 and 1 / 3 <= table["colour"]["majority"] < 1
    assert all(row["blind"] is not None for row in table.values())
    for key in ("made_with", "versions", "checkpoint"):
        assert results[key]
    made = results["made_with"]
    assert made["dtype"] == "float32" and len(made["checkpoint"]) == 16
    seen, blind = (read_answers(tmp_path / "eval" / "stamps" / f"answers{kind}.jsonl") for kind in ("", "_blind"))
    assert seen.keys() == blind.keys() and seen["text"] == blind["text"]
    assert any(seen[name]["text"] != blind[name]["text"] for name in seen)


def test_two_checkpoints_are_evaluated_and_compared(tmp_path, tinyllava) -> None:
    """A benchmark, a variant of another one, and a user's own questions, on the command line."""
    for name in ("pope", "textvqa"):
        copy_of(name, tmp_path)
        make_pictures(Factory("benchmarks").get(name)().questions(tmp_path))
    mine = tmp_path / "mine.jsonl"
    lines = [{"question_id": n, "text": f"Is {n} even?", "answer": "yes" if n % 2 else "no"} for n in range(6)]
    mine.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in (1, 2):
        checkpoint = new_checkpoint(tmp_path / f"checkpoint{number}", seed=number)
        arguments = ("--tasks", f"pope, textvqa-no-ocr,{mine}", "--data", tmp_path, "--output", tmp_path / f"{number}")
        result = tinyllava("eval", checkpoint, *arguments)
        assert result.code == 0, result.err
        assert "TextVQA no-ocr" in result.out and f"{number}/eval/mine/samples.html" in result.out
    results = json.loads((tmp_path / "1/results.json").read_text())
    assert list(results["tasks"]) == ["pope", "textvqa-no-ocr", "mine"]
    for name, entry in results["tasks"].items():
        low, high = entry["interval"]
        assert low <= entry["score"] <= high and len(entry["prompts"]) == 16
        items = (tmp_path / "1/eval" / name / "items.jsonl").read_text().splitlines()
        assert len(items) == entry["n"] and all(json.loads(line)["prompt"] for line in items)
    assert results["tasks"]["textvqa-no-ocr"]["metric"] == "TextVQA (no OCR)"

    result = tinyllava("eval", "--compare", tmp_path / "1", tmp_path / "2")
    assert result.code == 0 and len(result.out.splitlines()) == 3 and result.out.startswith("POPE: ")
    scored = tinyllava("score", "pope", "--data", tmp_path, "--answers", tmp_path / "1/eval/pope/answers.jsonl")
    again = tmp_path / "1/eval/pope/answers.scores"
    assert scored.code == 0 and json.loads((again / "results.json").read_text())["made_with"] == results["made_with"]
    assert "do not differ significantly" in tinyllava("eval", "--compare", tmp_path / "1", again, "--tasks", "pope").out
    graded = tinyllava("eval", "x", "--tasks", "pope", "--data", tmp_path, "--judge", "m")
    assert_refused(graded, "--judge is for mmvet")


def test_blind_removes_image_and_placeholder() -> None:
    question = Question("1", 1, "<image>\nWhat is it? ", images=("a.png", "b.png"))
    assert to_sample(question) == Sample([Message("user", "<image>\n<image>\nWhat is it?")], ["a.png", "b.png"], "1")
    assert to_sample(question, blind=True) == Sample([Message("user", "What is it?")], [], "1")


def test_kills_change_no_answer_and_nothing_is_asked_twice(session, stamps_root, tmp_path, monkeypatch) -> None:
    evaluate_tasks(session, ["stamps"], stamps_root, tmp_path / "whole", progress=False)
    rng, asked = random.Random(0), []
    generate_each = Session.generate_each

    class Killed(Exception):
        pass

    def killed_at_some_time(self, samples, *args, **kwargs):
        for index, answer in generate_each(self, samples, *args, **kwargs):
            if rng.random() < 0.1:
                raise Killed
            yield index, answer
            asked.append(samples[index].id)

    monkeypatch.setattr(Session, "generate_each", killed_at_some_time)
    kills = torn = 0
    while True:
        try:
            evaluate_tasks(session, ["stamps"], stamps_root, tmp_path / "killed", batch_size=4, progress=False)
            break
        except Killed:
            kills += 1
            path = max((tmp_path / "killed").rglob("answers*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
            data = path.read_bytes()
            if data and rng.random() < 0.5:  # the kill came while a line was written
                torn += 1
                path.write_bytes(data[: -rng.randint(1, len(data.splitlines()[-1]))])
    assert kills >= 3 and torn >= 1
    for name in ("answers.jsonl", "answers_blind.jsonl"):
        whole, pieced = ((tmp_path / run / "eval" / "stamps" / name).read_bytes() for run in ("whole", "killed"))
        assert sorted(pieced.splitlines()) == sorted(whole.splitlines())
    assert len(asked) == 2 * 41 + torn
    results = [json.loads((tmp_path / run / "results.json").read_text())["categories"] for run in ("whole", "killed")]
    assert results[0] == results[1]
    evaluate_tasks(session, ["stamps"], stamps_root, tmp_path / "killed", progress=False)
    assert len(asked) == 2 * 41 + torn  # all there: nothing is asked


def test_answers_of_another_model_are_moved(session, stamps_root, tmp_path, caplog) -> None:
    root = copy_of("pope", tmp_path)
    make_pictures(Factory("benchmarks").get("pope")().questions(root))
    out = tmp_path / "out"
    evaluate_tasks(session, ["pope"], tmp_path, out, progress=False)
    both = evaluate_tasks(session, ["stamps"], stamps_root, out, limit=5, progress=False)
    assert list(both["tasks"]) == ["pope", "stamps"] and both["tasks"]["stamps"]["n"] == 5
    old = (out / "eval" / "stamps" / "answers.jsonl").read_bytes()
    other = Session.load(new_checkpoint(tmp_path / "other", seed=7), device="cpu")
    results = evaluate_tasks(other, ["stamps"], stamps_root, out, limit=5, progress=False)
    assert list(results["tasks"]) == ["stamps"]
    assert "another checkpoint: they are moved to stamps.1" in caplog.text
    assert (out / "eval" / "stamps.1" / "answers.jsonl").read_bytes() == old
    assert (out / "eval" / "stamps" / "answers.jsonl").read_bytes() != old


def test_limit_keeps_the_questions_on_an_image_together() -> None:
    questions = [Question(f"{at}", at, images=(f"{at // 2}.png",)) for at in range(40)]
    chosen = pick_evenly(questions, 8)
    assert [question.id for question in chosen] == ["0", "1", "10", "11", "20", "21", "30", "31"]
    assert pick_evenly(questions, 100) == pick_evenly(questions, None) == questions
    assert len(pick_evenly([Question(str(at), at) for at in range(10)], 3)) == 3


def test_errors_come_before_the_first_question(session, stamps_root, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Session, "generate_each", lambda *_, **__: pytest.fail("asked"))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="unknown benchmark 'popee'; did you mean 'pope'"):
        evaluate_tasks(session, ["stamps", "popee"], stamps_root, out)
    with pytest.raises(UserError, match=r"expected coco/coco_pope_adversarial\.json or .* in .*nowhere"):
        evaluate_tasks(session, ["pope"], tmp_path / "nowhere", out)
    with pytest.raises(UserError, match="gqa requires its data: give --data ROOT"):
        evaluate_tasks(session, ["gqa"], None, out)
    with pytest.raises(UserError, match="not trained on stamps"):
        evaluate_tasks(session, ["stamps"], None, out)
    root = copy_of("pope", tmp_path)
    questions = Factory("benchmarks").get("pope")().questions(root)
    make_pictures(questions)
    Path(questions[3].images[0]).unlink()
    with pytest.raises(UserError, match=r"pope: 1 of its \d+ images cannot be read: image .*\.jpg not found"):
        evaluate_tasks(session, ["pope"], tmp_path, out)
    assert not out.exists()


def test_a_broken_line_among_the_answers_is_refused(tmp_path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": "1", "text": "a"}\nnot json\n{"id": "2", "text": "b"}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl, line 2 is not an answer"):
        read_answers(path)
    path.write_bytes('{"id": "1", "text": "a\u2028b"}\n{"id": "2", "te'.encode())
    assert read_answers(path) == {"1": {"id": "1", "text": "a\u2028b"}}
    assert path.read_bytes().endswith(b'b"}\n')


def item(category: str, score: float | None, gold: object = "x") -> dict:
    return {"id": str(id(gold)), "category": category, "score": score, "gold": gold}


def test_categories_have_accuracy_baselines_and_counts() -> None:
    seen = [item("a", 1.0, "yes"), item("a", 0.0, "no"), item("a", 1.0, "yes"), item("b", 0.3, ["x"] * 10)]
    blind = [item("a", 1.0), item("a", 0.0), item("a", 0.0), item("b", 0.0)]
    table = tabulate_categories(seen, blind, {"a": [0.1, 0.9]})
    third = pytest.approx(1 / 3)
    assert table["a"] == {
        "accuracy": pytest.approx(2 / 3),
        "interval": [0.1, 0.9],
        "blind": third,
        "majority": 2 / 3,
        "n": 3,
    }
    assert table["b"] == {"accuracy": 0.3, "interval": None, "blind": 0.0, "majority": None, "n": 1}
    assert tabulate_categories([item("a", None)], None, {}) == {}  # a test split: a server scores it
    assert is_above_baselines({"accuracy": 0.9, "blind": 0.5, "majority": 0.5, "n": 100})
    assert not is_above_baselines({"accuracy": 0.55, "blind": 0.5, "majority": None, "n": 100})


def test_the_page_needs_no_other_file(session, stamps_root, tmp_path) -> None:
    evaluate_tasks(session, ["stamps"], stamps_root, tmp_path, progress=False)
    page = (tmp_path / "eval" / "stamps" / "samples.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 23 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page.replace("http-equiv", "") and "@import" not in page
    assert page.count("<article>") == 24 and "What colour &lt;is&gt; it?" in page and "expected: " in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_takes_categories_in_turn() -> None:
    items = [item("a", 1.0) for _ in range(50)] + [item("a", 0.0)] * 2 + [item("b", 0.0)] * 3 + [item("c", 1.0)]
    chosen = pick_items(items, 10)
    assert [one["category"] for one in chosen] == ["a"] * 6 + ["b"] * 3 + ["c"]
    assert [one["score"] for one in chosen[:6]] == [1, 0, 1, 0, 1, 1]


def test_the_table_shows_each_category(session, stamps_root, tmp_path) -> None:
    results = evaluate_tasks(session, ["stamps"], stamps_root, tmp_path, progress=False)
    console = Console(file=io.StringIO(), width=100)
    print_scores(results, console=console)
    text = console.file.getvalue()
    row = results["categories"]["colour"]
    numbers = [f"{100 * row[name]:.1f}" for name in ("accuracy", "blind", "majority")]
    low, high = (f"{100 * bound:.1f}" for bound in row["interval"])
    assert float(low) <= float(numbers[0]) <= float(high)
    assert ["colour", numbers[0], f"{low}\u2013{high}", *numbers[1:], "20"] in [
        line.split() for line in text.splitlines()
    ]
    assert "Stamps accuracy over all questions" in text
