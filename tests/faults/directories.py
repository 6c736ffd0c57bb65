"""Two runs in one directory, and damage to what a run has written."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.points import Point
from tests.faults.scene import Outcome, Result, Row, Scene, expect
from tests.faults.table import Fault


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file: its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Keep half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """Empty a file, as a loss of power can."""
    path.write_bytes(b"")


def empty_all(folder: Path) -> None:
    """Empty all files of a folder."""
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()  # a hard link must not empty the file of another checkpoint
            path.touch()


DAMAGES: dict[str, tuple[str, Callable]] = {
    "a bit of the weights": ("language_model.safetensors", flip),
    "a bit of optimizer.pt": ("optimizer.pt", flip),
    "a bit of the random numbers": ("rng_state.pth", flip),
    "a bit of tokenizer.json": ("tokenizer.json", flip),
    "weights cut": ("language_model.safetensors", cut),
    "scheduler.pt missing": ("scheduler.pt", os.unlink),
    "trainer_state.json cut": ("trainer_state.json", cut),
    "tinyllava.json of 0 bytes": ("tinyllava.json", empty),
    "all files of 0 bytes": ("", empty_all),
}


def damage_newest(where: str) -> Row:
    """The newest checkpoint is damaged after a kill: the one before it is used, and the command says so."""
    name, damage = DAMAGES[where]

    def row(scene: Scene, measure: Result) -> Outcome:
        first = scene.start(Point("end", "finetune/11", "kill")).wait()
        damage(scene.last / "checkpoint-9" / name)
        second = scene.finish()
        expect(second.begun == 12 + 6, f"it resumes at step {second.begun} of 36, expected 18")
        line = next((line for line in second.text.splitlines() if "checkpoint-9" in line), None)
        expect(line, "nothing is message about checkpoint-9")
        outcome = scene.compare(first, second, measure)
        return Outcome(second, outcome.repeated, outcome.difference, message=line or "")

    return row


def damage_and_go_on(point: Point, name: str, damage: Callable) -> Row:
    """Something else is damaged after a kill. It is made again."""

    def row(scene: Scene, measure: Result) -> Outcome:
        first = scene.start(point).wait()
        damage(scene.run / name)
        return scene.compare(first, scene.finish(), measure)

    return row


def damage_shared(scene: Scene, measure: Result) -> Outcome:
    """Frozen weights are one file with a link in each checkpoint, so its damage is refused. Then it is restored."""
    scene.start(Point("prepared", "finetune/0", "kill")).wait()
    weights = scene.run / "pretrain" / "final" / "language_model.safetensors"
    flip(weights)
    refused = scene.start().wait()
    expect(refused.code == 2, f"exit code {refused.code}, expected 2: {refused.message}")
    expect(weights.name in refused.message, f"the error does not name {weights.name}: {refused.message}")
    flip(weights)
    outcome = scene.compare(refused, scene.finish(), measure)
    return Outcome(refused, None, outcome.difference)


def run_twice(point: Point) -> Row:
    """A second run is started in the directory of a running one: it is refused, and the first is not disturbed."""

    def row(scene: Scene, measure: Result) -> Outcome:
        go = scene.folder / "go"
        first = scene.start(Point(point.event, point.pattern, "hold", str(go)))
        held, begun = Path(f"{go}.held"), time.monotonic()
        while not held.exists():
            expect(first.is_alive and time.monotonic() - begun < 120, "the first run never got there")
            time.sleep(0.02)
        second = scene.start().wait()
        go.touch()
        first.wait()
        expect(second.code == 2, f"exit code {second.code} of the second, expected 2: {second.message}")
        expect(first.code == 0, f"exit code {first.code} of the first: {first.message}")
        outcome = scene.compare(first, first, measure)
        return Outcome(second, outcome.repeated, outcome.difference)

    return row


def delete_run(scene: Scene, measure: Result) -> Outcome:
    """The run's directory is deleted while it trains. The run stops with an error, and starts again from nothing."""
    go = scene.folder / "go"
    first = scene.start(Point("end", "finetune/7", "hold", str(go)))
    first.wait_for("end finetune 7")
    shutil.rmtree(scene.run)
    go.touch()
    first.wait()
    expect(first.code == 2, f"exit code {first.code}, expected 2: {first.message}")
    return scene.compare(first, scene.finish(), measure)


def list_directory_faults() -> Iterator[Fault]:
    """Faults of a run's directory."""
    yield Fault("second run in the directory", "in a step", run_twice(Point("end", "finetune/5", "")))
    yield Fault("second run in the directory", "before the first step", run_twice(Point("prepared", "pretrain/0", "")))
    for where in DAMAGES:
        yield Fault("newest checkpoint damaged", where, damage_newest(where))
    killed, over = Point("end", "finetune/8", "kill"), Point("renamed", "*/finetune/final", "kill")
    between = Point("prepared", "finetune/0", "kill")
    weights = "final/language_model.safetensors"
    others = {
        "a bit of final/ of the first stage": (between, "pretrain/final/connector.safetensors", flip),
        "tinyllava.json of 0 bytes in final/": (over, "finetune/final/tinyllava.json", empty),
        "a bit of final/ of the last stage": (over, f"finetune/{weights}", flip),
        "run.json of 0 bytes": (killed, "run.json", empty),
        "recipe.yaml of 0 bytes": (killed, "recipe.yaml", empty),
        "metrics.jsonl cut": (
            killed,
            "finetune/metrics.jsonl",
            lambda path: os.truncate(path, path.stat().st_size - 9),
        ),
    }
    for where, (point, name, damage) in others.items():
        yield Fault("other damage", where, damage_and_go_on(point, name, damage))
    yield Fault("other damage", "a bit of frozen weights, which all checkpoints of a stage share", damage_shared)
    yield Fault("directory deleted", "in a step", delete_run)
