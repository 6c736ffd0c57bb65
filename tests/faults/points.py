"""Points in a training process at which a fault strikes: a step, the writing of a file, a rename.

A point is an event, a pattern of its subject, and what happens there. The events:

    prepared train begin micro_batch gradients end validated saved trained    STAGE/STEP of the trainer
    write                                                                     PATH, before it is written
    written                                                                   PATH, after safetensors or torch wrote it
    rename renamed                                                            PATH of the target, before and after
    rmtree                                                                    PATH, before a folder is deleted

Points strike by what the process does, not by the clock. So they strike at the same place on every machine.
"""

import glob
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import TrainerCallback

from tinyllava.commands import follow

BLOCK = 4096  # bytes of a block of tmpfs


@dataclass(frozen=True)
class Point:
    """What happens at the `nth` event whose subject matches.

    action: kill, kill_all (the data workers too), signal, signal_all, halve (cut the file that was written, then kill),
    fill (the disk), hold (until the file `argument` is there), hide or cut (files; copies are kept), kill_worker.
    argument: the signal's name, a path, or a pattern of paths. rank: which rank of several.
    """

    event: str
    pattern: str
    action: str
    argument: str = ""
    nth: int = 1
    room: int = 0  # bytes that `fill` leaves
    pad: str = ""  # files whose last block `fill` ends with line breaks: the next line needs a new block
    rank: int = 0


class Striker:
    """Counts what a process does, writes down its steps, and strikes at the points."""

    def __init__(self, points: list[Point], steps: Path) -> None:
        """steps: the file for lines such as `end finetune 3`. It tells which steps a process did, and repeats."""
        self.rank = int(os.environ.get("RANK", 0))
        self.points = [point for point in points if point.rank == self.rank]
        self.counts = [0] * len(self.points)
        self.process = os.getpid()
        self.is_striking = False
        self.steps = steps.open("a", encoding="utf-8", buffering=1) if self.rank == 0 else None

    def reach(self, event: str, subject: str) -> None:
        """Strike if a point waits for this event. Data workers, which are copies of this process, never strike."""
        if os.getpid() != self.process or self.is_striking:
            return
        for number, point in enumerate(self.points):
            if point.event == event and fnmatch(subject, point.pattern):
                self.counts[number] += 1
                if self.counts[number] == point.nth:
                    self.is_striking = True
                    strike(point, subject)
                    self.is_striking = False

    def install(self) -> None:
        """Watch files, renames and steps of this process, for as long as it lives."""
        sys.addaudithook(self._audit)
        safetensors.torch.serialize_file = self._watch(safetensors.torch.serialize_file, 1)
        torch.save = self._watch(torch.save, 1)
        os.rename, os.replace = self._watch_rename(os.rename), self._watch_rename(os.replace)
        shown = follow.follow_stage

        def follow_and_watch(name: str, setup: Any, output: Path) -> list[TrainerCallback]:
            self.reach("prepared", f"{name}/0")
            return [*shown(name, setup, output), Steps(self, name)]

        follow.follow_stage = follow_and_watch

    def note(self, text: str) -> None:
        """Add a line to the file of steps."""
        if self.steps:
            self.steps.write(f"{text}\n")

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "shutil.rmtree":
            self.reach("rmtree", os.fspath(arguments[0]))
        elif event == "open" and isinstance(arguments[0], str | os.PathLike):
            path, mode, flags = arguments
            is_for_writing = any(letter in (mode or "") for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR)
            if is_for_writing:
                self.reach("write", os.fspath(path))

    def _watch(self, write: Callable, position: int) -> Callable:
        """`write`, whose argument `position` is the path: neither torch nor safetensors tells Python what it opens."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            path = args[position] if len(args) > position else ""
            subject = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
            self.reach("write", subject)
            result = write(*args, **kwargs)
            self.reach("written", subject)
            return result

        return watched

    def _watch_rename(self, rename: Callable) -> Callable:
        def watched(source: Any, target: Any, **kwargs: Any) -> None:
            self.reach("rename", os.fspath(target))
            rename(source, target, **kwargs)
            self.reach("renamed", os.fspath(target))

        return watched


class Steps(TrainerCallback):
    """Tells a Striker where the trainer of a stage is."""

    def __init__(self, striker: Striker, stage: str) -> None:
        self.striker, self.stage = striker, stage

    def _reach(self, event: str, step: int, is_noted: bool = False) -> None:
        if is_noted:
            self.striker.note(f"{event} {self.stage} {step}")
        self.striker.reach(event, f"{self.stage}/{step}")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._reach("train", state.global_step, is_noted=True)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._reach("begin", state.global_step + 1)

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        self._reach("micro_batch", state.global_step + 1)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._reach("gradients", state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._reach("end", state.global_step, is_noted=True)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._reach("validated", state.global_step)

    def on_save(self, args, state, control, **kwargs) -> None:
        self._reach("saved", state.global_step, is_noted=True)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._reach("trained", state.global_step)


def strike(point: Point, subject: str) -> None:
    """Do what the point says, to this process or to its files."""
    match point.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill_all":
            os.killpg(0, signal.SIGKILL)
        case "signal":
            os.kill(os.getpid(), signal.Signals[point.argument])
        case "signal_all":
            os.killpg(0, signal.Signals[point.argument])
        case "halve":
            os.truncate(subject, os.path.getsize(subject) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        case "fill":
            for path in glob.glob(point.pad, recursive=True):
                with open(path, "ab") as file:
                    file.write(b"\n" * (-file.tell() % BLOCK))
            fill_disk(Path(point.argument), point.room)
        case "hold":
            Path(f"{point.argument}.held").touch()
            while not os.path.exists(point.argument):
                time.sleep(0.02)
        case "hide" | "cut":
            for path in glob.glob(point.argument):
                shutil.copy(path, f"{path}.kept")
                os.truncate(path, os.path.getsize(path) // 2)
                if point.action == "hide":
                    os.unlink(path)
        case "kill_worker":
            multiprocessing.active_children()[0].kill()
        case _:
            raise ValueError(point.action)


def fill_disk(folder: Path, room: int) -> None:
    """Fill the file system of `folder` with a file, as another user's job would, up to `room` bytes."""
    with (folder / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 20, BLOCK):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:  # full
                continue
        file.truncate(max(0, file.tell() - room))
