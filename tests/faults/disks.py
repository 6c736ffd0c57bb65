"""A full disk in each place that a run writes to.

The run's directory is a small file system of its own (tmpfs). When the run is about to write a certain file, another
file takes all the space, as another user's job would. Then the space is freed, and the same command runs again.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.faults.points import BLOCK, Point, fill_disk
from tests.faults.scene import SAVE_STEPS, Outcome, Result, Row, Scene, expect
from tests.faults.table import Fault

TMPFS = ("-t", "tmpfs", "-o", "size=64m", "tmpfs")
QUESTIONS = [{"question_id": f"q{number}", "image": f"{number}.png", "text": "What is it?"} for number in range(4)]
PLACES = [
    ("weights of a checkpoint", Point("write", "*/.checkpoint-9.partial/*language_model.safetensors", "", room=BLOCK)),
    ("tokenizer of a checkpoint", Point("write", "*/finetune/.checkpoint-9.partial/*tokenizer_config.json", "")),
    ("optimizer.pt", Point("write", "*/finetune/.checkpoint-9.partial/*optimizer.pt", "", room=BLOCK)),
    ("scheduler.pt", Point("write", "*/finetune/.checkpoint-9.partial/*scheduler.pt", "")),
    ("trainer_state.json", Point("write", "*/pretrain/.checkpoint-9.partial/*trainer_state.json", "")),
    ("record of a checkpoint", Point("write", "*/finetune/.checkpoint-9.partial/*tinyllava.json*", "")),
    ("final/ of the first stage", Point("write", "*/pretrain/.final.partial/*connector.safetensors", "")),
    ("final/ of the last stage", Point("write", "*/finetune/.final.partial/*language_model.safetensors", "")),
    ("record of final/", Point("write", "*/finetune/.final.partial/*tinyllava.json*", "")),
    ("recipe.yaml", Point("write", "*recipe.yaml*", "")),
    ("run.json", Point("write", "*run.json*", "")),
    ("run.json, after the training", Point("write", "*run.json*", "", nth=2)),
    ("metrics.jsonl", Point("begin", "finetune/8", "", pad="finetune/metrics.jsonl")),
    ("metrics.jsonl, at its start", Point("train", "pretrain/0", "")),
    ("curve.png", Point("write", "*/finetune/*curve.png*", "")),
    ("TensorBoard files", Point("begin", "finetune/8", "", pad="finetune/runs/**/events*")),
]


def expect_full(text: str, code: int | None) -> None:
    """The command must end with our own error, which says that the disk is full."""
    expect(code == 2, f"exit code {code}, expected 2: {text}")
    expect("full" in text or "No space left" in text, f"it does not say that the disk is full: {text}")


def fill_at(where: str, point: Point) -> Row:
    """Fill the disk at a point, free it, and resume."""

    def row(scene: Scene, measure: Result) -> Outcome:
        disk = scene.mount(scene.folder / "runs", *TMPFS)
        if where == "TensorBoard files":
            scene.trainer["report_to"] = "tensorboard"
            scene.write_recipe()
        pad = str(scene.run / point.pad) if point.pad else ""
        full = replace(point, action="fill", argument=str(disk), pad=pad)
        first = scene.start(full, draws=where == "curve.png").wait()
        expect((disk / "ballast").exists(), f"`{where}` was never written")
        (disk / "ballast").unlink()
        if first.code == 0 and where in ("curve.png", "TensorBoard files"):  # only a picture is missing
            return scene.compare(first, first, measure)
        expect_full(first.message, first.code)
        outcome = scene.compare(first, scene.finish(), measure)
        expect(outcome.repeated <= SAVE_STEPS, f"{outcome.repeated} steps are repeated")
        return outcome

    return row


def fill_cache(room: int) -> Row:
    """A cache on a disk that is full after `room` bytes."""

    def row(scene: Scene, measure: Result) -> Outcome:
        disk = scene.mount(scene.cache, *TMPFS)
        fill_disk(disk, room)
        first = scene.start().wait()
        expect_full(first.message, first.code)
        (disk / "ballast").unlink()
        return scene.compare(first, scene.finish(), measure)

    return row


def fill_scores(pattern: str) -> Row:
    """A full disk while the recipe's `eval:` list is scored, after the training."""

    def row(scene: Scene, measure: Result) -> Outcome:
        lines = [
            json.dumps({**each, "answer": "thing", "image": str(scene.data / each["image"])}) for each in QUESTIONS
        ]
        asked = scene.folder / "asked.jsonl"
        asked.write_text("\n".join(lines))
        scene.top["eval"] = [str(asked)]
        scene.write_recipe()
        disk = scene.mount(scene.folder / "runs", *TMPFS)
        first = scene.start(Point("write", pattern, "fill", str(disk))).wait()
        expect((disk / "ballast").exists(), f"`{pattern}` was never written")
        (disk / "ballast").unlink()
        expect_full(first.message, first.code)
        second = scene.finish()
        answers = next(Path(scene.run).glob("eval/*/answers.jsonl")).read_text().splitlines()
        ids = [json.loads(line)["question_id"] for line in answers]
        expect(sorted(ids) == [each["question_id"] for each in QUESTIONS], f"answers to {ids}")
        expect((scene.run / "results.json").is_file(), "results.json is missing")
        return scene.compare(first, second, measure)

    return row


def list_disk_faults() -> Iterator[Fault]:
    """A full disk in each writing place."""
    for where, point in PLACES:
        yield Fault("disk full", where, fill_at(where, point), mounts=True)
    yield Fault("disk full", "cache, at once", fill_cache(BLOCK), mounts=True)
    yield Fault("disk full", "cache, while it is written", fill_cache(6 * BLOCK), mounts=True)
    yield Fault("disk full", "answers of `eval:`", fill_scores("*/eval/*answers.jsonl*"), mounts=True)
    yield Fault("disk full", "results.json of `eval:`", fill_scores("*results.json*"), mounts=True)
