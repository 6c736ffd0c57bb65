"""A scene: data, a recipe of two stages, and a directory for its run. The undisturbed run is the measure.

The stages have 12 and 24 steps of two micro-batches, with one data worker, a validation every sixth step and a
checkpoint every third. A killed run therefore repeats at most three steps.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file

from tests.conftest import make_pictures, tiny_model
from tests.faults.child import Job, run_forked
from tests.faults.points import Point
from tests.train.tiny_run import recipe

STEPS = {"pretrain": 12, "finetune": 24}
OFFSETS = {"pretrain": 0, "finetune": 12}
SAVE_STEPS = 3
TIMEOUT = 240.0  # seconds; a run takes 5 to 15
LORA = {"connector": "full", "llm": {"lora": {"r": 4, "alpha": 8}}}
FORK = multiprocessing.get_context("forkserver")  # imports torch once, and forks each start from there
ROOT = Path(__file__).parents[2]


class Failure(Exception):
    """What happened is not what was expected. It becomes the verdict of a row."""


class Skip(Exception):
    """This machine cannot play the fault: a mount is refused, for example."""


def expect(condition: Any, text: str) -> None:
    """Raise Failure with `text` if the condition does not hold."""
    if not condition:
        raise Failure(text)


@dataclass
class Start:
    """A started command. `wait` returns when it has ended."""

    process: Any  # of multiprocessing, or a Popen of torchrun
    printed: Path
    steps_path: Path
    code: int | None = None

    def wait(self, timeout: float = TIMEOUT) -> "Start":
        """Wait for the end. Raises Failure, and ends the process, if it takes too long.

        Data workers that outlive a killed process are left alone: they must not disturb the next start.
        """
        if isinstance(self.process, subprocess.Popen):
            with suppress_timeout():
                self.code = self.process.wait(timeout)
        else:
            self.process.join(timeout)
            self.code = self.process.exitcode
        if self.code is None:
            self.end(signal.SIGKILL)
            raise Failure(f"it hangs: still running after {timeout:.0f} s. {self.last_line}")
        return self

    def end(self, number: int) -> None:
        """Send a signal to the process and its data workers."""
        with suppress_gone():
            os.killpg(self.process.pid, number)

    def wait_for(self, line: str, timeout: float = TIMEOUT) -> None:
        """Wait until the process has written this line to its steps, such as `end finetune 7`."""
        begun = time.monotonic()
        while line not in self.steps:
            expect(self.is_alive and time.monotonic() - begun < timeout, f"`{line}` was never reached")
            time.sleep(0.01)

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll() is None
        return self.process.is_alive()

    @property
    def steps(self) -> list[str]:
        """The lines that points.py wrote of this start."""
        return self.steps_path.read_text().splitlines() if self.steps_path.is_file() else []

    @property
    def text(self) -> str:
        """Everything that the command printed."""
        return self.printed.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        """The last line that was printed."""
        return ([line for line in self.text.splitlines() if line.strip()] or [""])[-1]

    @property
    def message(self) -> str:
        """What the command message when it ended: its error, else its last line; nothing after SIGKILL."""
        lines = self.text.splitlines()
        errors = [line for line in lines if line.startswith(("error:", "stopped by"))]
        if self.code in (0, -signal.SIGKILL):
            return ""
        if isinstance(self.process, subprocess.Popen):  # torchrun ends with tracebacks of its own
            errors += [line.partition(": ")[2] for line in lines if "received by PID" in line]
            return errors[0] if errors else self.last_line
        if any(line.startswith("Traceback (most recent call last)") for line in lines):
            return f"Traceback: {self.last_line}"
        return (errors or [self.last_line])[0]

    @property
    def done(self) -> int:
        """The last step that was finished, counted over both stages; 0 if none was."""
        return max((position(line) for line in self.steps if line.startswith("end")), default=0)

    @property
    def begun(self) -> int | None:
        """The step at which it began to train; None if it trained nothing."""
        return next((position(line) for line in self.steps if line.startswith("train")), None)


def position(line: str) -> int:
    """The step of a line such as `end finetune 3`, counted over both stages."""
    _, stage, step = line.split()
    return OFFSETS[stage] + int(step)


@contextmanager
def suppress_gone() -> Iterator[None]:
    try:
        yield
    except (ProcessLookupError, PermissionError):
        return


@contextmanager
def suppress_timeout() -> Iterator[None]:
    try:
        yield
    except subprocess.TimeoutExpired:
        return


@dataclass
class Result:
    """What a run wrote: all its losses by stage and step, and the weights of its last checkpoint."""

    losses: dict[tuple, float]
    weights: dict[str, Any]

    @classmethod
    def read(cls, run: Path) -> "Result":
        """Read a finished run. Raises Failure if a step is missing or logged twice."""
        losses: dict[tuple, float] = {}
        for stage, count in STEPS.items():
            path = run / stage / "metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
            trained = [line["step"] for line in lines if "loss" in line]
            expect(trained == list(range(1, count + 1)), f"{stage} logged the steps {trained}")
            for kind in ("loss", "eval_loss"):
                losses |= {(stage, kind, line["step"]): line[kind] for line in lines if kind in line}
        files = sorted((run / "finetune" / "final").glob("*.safetensors"))
        return cls(losses, {f"{file.name}:{name}": value for file in files for name, value in load_file(file).items()})

    @property
    def final_loss(self) -> float:
        """The last validation loss."""
        return self.losses["finetune", "eval_loss", STEPS["finetune"]]

    def check_equal(self, other: "Result", tolerance: float = 0.0) -> None:
        """Raise Failure if a loss, or a weight at the end, differs from those of `other` by more than the tolerance."""
        expect(self.losses.keys() == other.losses.keys(), "other steps were validated or logged")
        far = [key for key in self.losses if not abs(self.losses[key] - other.losses[key]) <= tolerance]
        expect(not far, f"{len(far)} losses differ, first {far[:1]}")
        expect(self.weights.keys() == other.weights.keys(), "the last checkpoint has other tensors")
        for name, value in self.weights.items():
            expect(abs(value - other.weights[name]).max(initial=0) <= 20 * tolerance, f"{name} differs at the end")


@dataclass
class Outcome:
    """What a row shows."""

    first: Start
    repeated: int | None = None  # steps that were trained twice; None if nothing was resumed
    difference: float | None = None  # of the final loss to that of the undisturbed run
    note: str = ""
    message: str = ""  # for the table


@dataclass
class Scene:
    """The files of one row, in a folder of its own."""

    folder: Path
    variant: str = "full"
    trainer: dict = field(default_factory=dict)
    stage: dict = field(default_factory=dict)
    top: dict = field(default_factory=dict)  # other keys of the recipe, such as `eval`
    environment: dict = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    mounts: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        make_pictures(self.data)
        self.write_recipe()

    @property
    def data(self) -> Path:
        """The folder of images and annotations."""
        return self.folder / "pictures"

    @property
    def run(self) -> Path:
        """The directory of the run."""
        return self.folder / "runs" / "tiny"

    @property
    def cache(self) -> Path:
        """The cache of prepared data."""
        return self.folder / "cache"

    @cached_property
    def last(self) -> Path:
        """The directory of the second stage."""
        return self.run / "finetune"

    def write_recipe(self, **stage: Any) -> None:
        """Write tiny.yaml; `stage` changes the second stage."""
        self.stage |= stage
        tune = LORA if self.variant == "lora" else {"connector": "full", "llm": "full"}
        content = recipe(self.data, tune, tiny_model()).model_dump(mode="json", exclude_unset=True)
        for name, steps in STEPS.items():
            trainer = {"save_steps": SAVE_STEPS, "max_steps": steps, "dataloader_num_workers": 1, **self.trainer}
            content["stages"][name]["trainer"] |= trainer
            content["stages"][name]["trainer"].pop("save_strategy", None)
        content["stages"]["finetune"]["trainer"] |= {"eval_steps": 6}
        content["stages"]["finetune"] |= self.stage
        if self.variant == "stream":
            content["stages"]["finetune"]["validation"] = [{"path": str(self.data / "captions.json")}]
            content["stages"]["finetune"]["data"][0]["streaming"] = True
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump({**content, **self.top}, sort_keys=False))

    def make_job(self, *points: Point, **options: Any) -> Job:
        """The job of one more start."""
        number = len(self.starts)
        return Job(
            arguments=["train", "tiny.yaml", "--output", str(self.run)],
            folder=str(self.folder),
            printed=str(self.folder / f"start-{number}.txt"),
            steps=str(self.folder / f"start-{number}.steps"),
            points=list(points),
            environment={"TINYLLAVA_CACHE": str(self.cache), **self.environment},
            **options,
        )

    def start(self, *points: Point, **options: Any) -> Start:
        """Start the command in a fork of a process that has imported everything. `options` are those of Job."""
        job = self.make_job(*points, **options)
        process = FORK.Process(target=run_forked, args=(job,))
        process.start()
        return self.add(Start(process, Path(job.printed), Path(job.steps)))

    def start_ranks(self, *points: Point, ranks: int = 2) -> Start:
        """Start the command under torchrun, in processes of their own."""
        job = self.make_job(*points)
        path = job.save(self.folder / f"job-{len(self.starts)}.json")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        with open(job.printed, "wb") as printed:
            process = subprocess.Popen(
                [*torchrun, "-m", "tests.faults.child", str(path)],
                cwd=ROOT,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.add(Start(process, Path(job.printed), Path(job.steps)))

    def add(self, start: Start) -> Start:
        """Remember a start, so that it is ended with the scene."""
        self.starts.append(start)
        return start

    def finish(self, **options: Any) -> Start:
        """Start the command without a fault, and wait. Raises Failure if it does not end well."""
        start = self.start(**options).wait()
        expect(start.code == 0, f"the next start exits with {start.code}: {start.message}")
        return start

    def mount(self, path: Path, *options: str) -> Path:
        """Mount a file system of its own at `path`, such as `-t tmpfs -o size=1m tmpfs`. Raises Skip if refused."""
        path.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True)
        if done.returncode:
            raise Skip(f"mount: {done.stderr.strip()}")
        self.mounts.append(path)
        return path

    def close(self) -> None:
        """End what still runs, and delete the files."""
        for start in self.starts:
            if start.is_alive:
                start.end(signal.SIGKILL)
        for mount in reversed(self.mounts):
            subprocess.run(["umount", "--lazy", str(mount)], check=False, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def compare(self, first: Start, second: Start, measure: Result, tolerance: float = 0.0) -> Outcome:
        """The outcome of a start that a fault ended, and of the one that resumed: the same one if it went on.

        Raises Failure for a difference.
        """
        result = Result.read(self.run)
        result.check_equal(measure, tolerance)
        difference = abs(result.final_loss - measure.final_loss)
        if first is second:
            return Outcome(first, None, difference)
        begun = second.begun if second.begun is not None else first.done
        return Outcome(first, max(0, first.done - begun), difference)


Row = Callable[[Scene, Result], Outcome]
