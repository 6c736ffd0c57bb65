"""SIGKILL at 20 moments, and the signals with which schedulers and users stop a run."""

import random
import signal
import time
from collections.abc import Iterator

from tests.faults.points import Point
from tests.faults.scene import SAVE_STEPS, STEPS, Outcome, Result, Row, Scene, Start, expect
from tests.faults.table import Fault

RANDOM = random.Random(14)  # fixes the steps and the delays
STOPPED = 75  # EX_TEMPFAIL: a scheduler starts the command again
INTERRUPTED = 130


def choose_step(stage: str, first: int = 1, last: int | None = None) -> int:
    """A step of a stage."""
    return RANDOM.randint(first, last or STEPS[stage])


def choose_save(stage: str) -> int:
    """A step after which a checkpoint is written."""
    return SAVE_STEPS * RANDOM.randint(1, STEPS[stage] // SAVE_STEPS)


def resume(scene: Scene, measure: Result, first: Start, code: int, most: int) -> Outcome:
    """Expect the exit code of a start, run the command again, and expect at most `most` repeated steps."""
    expect(first.code == code, f"exit code {first.code}, expected {code}: {first.message}")
    outcome = scene.compare(first, scene.finish(), measure)
    expect(outcome.repeated <= most, f"{outcome.repeated} steps are repeated, expected at most {most}")
    return outcome


def kill_at(*points: Point) -> Row:
    """Kill the process at a point of a step or of a file, and resume."""

    def row(scene: Scene, measure: Result) -> Outcome:
        return resume(scene, measure, scene.start(*points).wait(), -signal.SIGKILL, SAVE_STEPS)

    return row


def kill_after(line: str, delay: float, whole: bool) -> Row:
    """Kill the process, or it and its data workers, some time after a step."""

    def row(scene: Scene, measure: Result) -> Outcome:
        first = scene.start()
        first.wait_for(line)
        time.sleep(delay)
        if whole:
            first.end(signal.SIGKILL)
        else:
            first.process.kill()
        return resume(scene, measure, first.wait(), -signal.SIGKILL, SAVE_STEPS)

    return row


def kill_twice(line: Point, again: Point) -> Row:
    """Kill the process, and kill the one that resumes."""

    def row(scene: Scene, measure: Result) -> Outcome:
        first = scene.start(line).wait()
        expect(first.code == -signal.SIGKILL, f"exit code {first.code}: {first.message}")
        second = scene.start(again).wait()
        expect(second.code == -signal.SIGKILL, f"exit code {second.code}: {second.message}")
        return scene.compare(first, scene.finish(), measure)

    return row


def stop_at(point: Point, code: int = STOPPED) -> Row:
    """Send a signal at a point: everything done is saved, and nothing is repeated."""

    def row(scene: Scene, measure: Result) -> Outcome:
        return resume(scene, measure, scene.start(point).wait(), code, most=0)

    return row


def stop_after(line: str, delay: float, number: int, code: int = STOPPED, times: int = 1) -> Row:
    """Send a signal some time after a step, from outside, `times` times."""

    def row(scene: Scene, measure: Result) -> Outcome:
        first = scene.start()
        first.wait_for(line)
        for _ in range(times):
            time.sleep(delay)
            if first.is_alive:
                first.end(number)
        return resume(scene, measure, first.wait(), code, most=0)

    return row


def suspend(scene: Scene, measure: Result) -> Outcome:
    """Stop and continue the processes, as a scheduler does that lends the node to another job."""
    first = scene.start()
    first.wait_for("end finetune 5")
    first.end(signal.SIGSTOP)
    time.sleep(2)
    first.end(signal.SIGCONT)
    first.wait()
    expect(first.code == 0, f"exit code {first.code}: {first.message}")
    return scene.compare(first, first, measure)


def list_kills() -> Iterator[Fault]:
    """Twenty SIGKILLs, and two in a row."""
    steps = [(stage, event) for stage in STEPS for event in ("begin", "micro_batch", "gradients", "end")]
    for number, (stage, event) in enumerate(steps):
        step = choose_step(stage)
        action = "kill" if number % 2 else "kill_all"
        variant = ("full", "lora", "stream")[number % 3]
        yield Fault("SIGKILL", "in a step", kill_at(Point(event, f"{stage}/{step}", action)), variant)

    def partial(name: str, event: str = "write", action: str = "kill", stage: str = "finetune") -> Point:
        return Point(event, f"*/{stage}/.checkpoint-{choose_save(stage)}.partial/*{name}", action)

    save = choose_save("finetune")
    writing = [
        partial("language_model.safetensors", "written", "halve"),
        partial("optimizer.pt", "written", "halve"),
        partial("trainer_state.json", stage="pretrain"),
        partial("tinyllava.json*"),
        Point("rename", f"*/finetune/checkpoint-{save}", "kill_all"),
        Point("renamed", f"*/finetune/checkpoint-{save}", "kill_all"),
    ]
    for number, point in enumerate(writing):
        yield Fault("SIGKILL", "while a checkpoint is written", kill_at(point), ("full", "lora")[number == 1])
    old = Point("rmtree", f"*/finetune/checkpoint-{SAVE_STEPS}", "kill")
    yield Fault("SIGKILL", "while an old checkpoint is deleted", kill_at(old))
    half = Point("written", "*/pretrain/.final.partial/*connector.safetensors", "halve")
    yield Fault("SIGKILL", "while `final` is written", kill_at(half))
    yield Fault("SIGKILL", "while `final` is written", kill_at(Point("rename", "*/finetune/final", "kill_all")))
    yield Fault("SIGKILL", "between the stages", kill_at(Point("prepared", "finetune/0", "kill")))
    yield Fault("SIGKILL", "before the first step", kill_at(Point("prepared", "pretrain/0", "kill")))
    late = RANDOM.uniform(0, 0.5)
    line = f"end finetune {choose_step('finetune', last=20)}"
    yield Fault("SIGKILL", "after a random delay", kill_after(line, late, whole=False))
    twice = kill_twice(Point("end", "finetune/8", "kill"), Point("train", "finetune/6", "kill"))
    yield Fault("SIGKILL", "again, while it resumes", twice)


def list_stops() -> Iterator[Fault]:
    """Ten SIGTERMs, and the other signals."""
    points = [
        ("in a step", Point("begin", f"pretrain/{choose_step('pretrain')}", "signal", "SIGTERM")),
        ("in a step", Point("micro_batch", f"finetune/{choose_step('finetune')}", "signal", "SIGTERM")),
        ("in a step", Point("end", f"finetune/{choose_step('finetune', last=23)}", "signal", "SIGTERM")),
        ("in a step", Point("gradients", f"finetune/{choose_step('finetune')}", "signal_all", "SIGTERM")),
        ("in a step", Point("begin", f"finetune/{choose_step('finetune', 8)}", "signal_all", "SIGTERM")),
        ("in a validation", Point("validated", "finetune/12", "signal", "SIGTERM")),
        ("while a checkpoint is written", Point("write", "*/.checkpoint-9.partial/*optimizer.pt", "signal", "SIGTERM")),
        ("while `final` is written", Point("rename", "*/pretrain/final", "signal", "SIGTERM")),
        ("between the stages", Point("prepared", "finetune/0", "signal", "SIGTERM")),
    ]
    for number, (where, point) in enumerate(points):
        yield Fault("SIGTERM", where, stop_at(point), ("full", "lora", "stream")[number % 3])
    line = f"end finetune {choose_step('finetune', last=15)}"
    yield Fault("SIGTERM", "after a random delay", stop_after(line, RANDOM.uniform(0, 0.05), signal.SIGTERM))
    twice = stop_after("end finetune 4", 0.02, signal.SIGTERM, times=2)
    yield Fault("SIGTERM", "twice", twice)
    for name in ("SIGUSR1", "SIGHUP"):
        yield Fault(name, "in a step", stop_at(Point("micro_batch", "finetune/8", "signal", name)))
        whole = stop_at(Point("begin", "finetune/14", "signal_all", name))
        yield Fault(name, "in a step, with the data workers", whole)
    stopped = stop_at(Point("micro_batch", "pretrain/5", "signal", "SIGINT"), INTERRUPTED)
    yield Fault("Ctrl-C", "in a step", stopped)
    whole = stop_at(Point("begin", "finetune/10", "signal_all", "SIGINT"), INTERRUPTED)
    yield Fault("Ctrl-C", "in a step, with the data workers", whole)
    yield Fault("SIGSTOP, SIGCONT", "for two seconds", suspend)
