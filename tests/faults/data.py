"""Data that changes or vanishes, data workers that die, clocks that are wrong, and a cache that cannot be written."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.points import Point
from tests.faults.scene import SAVE_STEPS, Outcome, Result, Row, Scene, expect
from tests.faults.table import Fault

YEAR = 365 * 86400.0
LOST = "[234].png"  # three images; at least two of them are in the training data
READ_AHEAD = 3  # steps that the data worker has prepared when the images vanish, at most


def lose_images(action: str) -> Row:
    """Images vanish or are damaged while the run trains. It stops with an error; they come back, and it resumes."""

    def row(scene: Scene, measure: Result) -> Outcome:
        point = Point("end", "finetune/7", action, str(scene.data / LOST))
        first = scene.start(point).wait()
        expect(first.code == 2, f"exit code {first.code}, expected 2: {first.message}")
        expect(".png" in first.message, f"the error names no image: {first.message}")
        for kept in scene.data.glob("*.kept"):
            kept.replace(kept.with_suffix(""))
        outcome = scene.compare(first, scene.finish(), measure)
        expect(outcome.repeated <= SAVE_STEPS, f"{outcome.repeated} steps are repeated")
        return outcome

    return row


def skip_images(action: str) -> Row:
    """The same with `on_bad_sample: skip`: the run ends, and counts what it left out."""

    def row(scene: Scene, measure: Result) -> Outcome:
        scene.write_recipe(on_bad_sample="skip")
        first = scene.start(Point("end", "finetune/7", action, str(scene.data / LOST))).wait()
        expect(first.code == 0, f"exit code {first.code}, expected 0: {first.message}")
        counted = json.loads((scene.run / "run.json").read_text())["stages"]["finetune"].get("skipped_in_training")
        expect(counted in (2, 3), f"skipped_in_training is {counted}, expected 2 or 3")
        result = Result.read(scene.run)
        difference = abs(result.final_loss - measure.final_loss)
        return Outcome(first, None, difference, f"{counted} samples are not learned, and counted")

    return row


def edit(change: Callable[[list], object]) -> Callable[[Path], None]:
    """Change the records of a file of annotations."""

    def apply(path: Path) -> None:
        records = json.loads(path.read_text())
        change(records)
        path.write_text(json.dumps(records))

    return apply


CHANGES = {
    "an answer is edited": edit(lambda records: records[3]["conversations"][1].update(value="another thing")),
    "a record is removed": edit(lambda records: records.pop(5)),
    "a record is added": edit(lambda records: records.append(records[0] | {"id": "new"})),
    "records are reordered": edit(list.reverse),
    "the file is missing": os.unlink,
    "the file is cut": lambda path: os.truncate(path, path.stat().st_size // 2),
}


def change_data(where: str) -> Row:
    """Data changes between a kill and the resume: it is refused. Then the data is restored."""

    def row(scene: Scene, measure: Result) -> Outcome:
        killed = scene.start(Point("end", "finetune/8", "kill")).wait()
        path = scene.data / "instructions.json"
        before = path.read_bytes()
        CHANGES[where](path)
        refused = scene.start().wait()
        expect(refused.code == 2, f"exit code {refused.code}, expected 2: {refused.message}")
        expect(path.name in refused.message, f"the error does not name the file: {refused.message}")
        path.write_bytes(before)
        outcome = scene.compare(killed, scene.finish(), measure)
        return Outcome(refused, outcome.repeated, outcome.difference)

    return row


def kill_worker(scene: Scene, measure: Result) -> Outcome:
    """A data worker is killed, as the system does when memory runs out."""
    first = scene.start(Point("end", "finetune/7", "kill_worker")).wait()
    if first.code == 0:
        return scene.compare(first, first, measure)
    expect(first.code == 2, f"exit code {first.code}, expected 2: {first.message}")
    expect("worker" in first.message, f"the error does not name the data worker: {first.message}")
    outcome = scene.compare(first, scene.finish(), measure)
    expect(outcome.repeated <= SAVE_STEPS, f"{outcome.repeated} steps are repeated")
    return outcome


def skew_files(scene: Scene, measure: Result) -> Outcome:
    """The files are dated a year ahead, and the newest checkpoint is dated before the older one."""
    first = scene.start(Point("end", "finetune/8", "kill")).wait()
    ahead, behind = time.time() + YEAR, time.time() - YEAR
    for path in scene.folder.rglob("*"):
        os.utime(path, (ahead, ahead))
    for path in (scene.last / "checkpoint-6", *(scene.last / "checkpoint-6").iterdir()):
        os.utime(path, (behind, behind))
    second = scene.finish()
    expect(second.begun == 12 + 6, f"it resumes at step {second.begun}")
    return scene.compare(first, second, measure)


def turn_clock(seconds: float) -> Row:
    """The clock is wrong when the run resumes."""

    def row(scene: Scene, measure: Result) -> Outcome:
        first = scene.start(Point("end", "finetune/8", "kill")).wait()
        return scene.compare(first, scene.finish(clock=seconds), measure)

    return row


def lock_empty_cache(scene: Scene, measure: Result) -> Outcome:
    """The cache is on a read-only file system, and empty. The command names the way out, and it works."""
    scene.mount(scene.cache, "-t", "tmpfs", "-o", "ro", "tmpfs")
    first = scene.start().wait()
    expect(first.code == 2, f"exit code {first.code}, expected 2: {first.message}")
    expect("TINYLLAVA_CACHE" in first.message, f"the error does not name TINYLLAVA_CACHE: {first.message}")
    scene.environment["TINYLLAVA_CACHE"] = str(scene.folder / "other")
    return scene.compare(first, scene.finish(), measure)


def lock_filled_cache(scene: Scene, measure: Result) -> Outcome:
    """The cache is on a read-only file system, and has what an earlier start prepared."""
    scene.start(Point("end", "finetune/8", "kill")).wait()
    scene.mount(scene.cache, "--bind", str(scene.cache))
    scene.mount(scene.cache, "-o", "remount,bind,ro")
    first = scene.start().wait()
    expect(first.code == 0, f"exit code {first.code}, expected 0: {first.message}")
    return scene.compare(first, first, measure)


def list_data_faults() -> Iterator[Fault]:
    """Faults of data, data workers, clocks and the cache."""
    for name, action in (("image vanishes", "hide"), ("image is cut", "cut")):
        yield Fault(name, "`on_bad_sample: error`", lose_images(action))
        yield Fault(name, "`on_bad_sample: skip`", skip_images(action))
    yield Fault("data worker killed", "in a step", kill_worker)
    yield Fault("data worker killed", "in a step of a stream", kill_worker, "stream")
    for where in CHANGES:
        yield Fault("changed data", f"{where} before the resume", change_data(where))
    yield Fault("clock skew", "files dated a year ahead, checkpoints in the wrong order", skew_files)
    yield Fault("clock skew", "the clock is a year behind at the resume", turn_clock(-YEAR))
    yield Fault("clock skew", "the clock is a year ahead at the resume", turn_clock(YEAR))
    yield Fault("read-only cache", "empty", lock_empty_cache, mounts=True)
    yield Fault("read-only cache", "filled by an earlier run", lock_filled_cache, mounts=True)
