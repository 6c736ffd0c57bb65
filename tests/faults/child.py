"""The process in which a fault strikes: `tinyllava train` with points. Also one rank under torchrun.

python -m tests.faults.child JOB.json
"""

import atexit
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

# Everything that training imports, once, before the processes of the table are forked. None of it starts a thread.
import tinyllava.commands.evaluate
import tinyllava.commands.follow
import tinyllava.config
import tinyllava.train.stage
from tests.faults.points import Point, Striker
from tinyllava import cli


@dataclass
class Job:
    """One start of the command: its arguments, where it writes what it prints, and what strikes it."""

    arguments: list[str]
    folder: str
    printed: str
    steps: str
    points: list[Point] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    clock: float = 0.0  # seconds that the clock of the process is wrong
    draws: bool = False  # curve.png, which takes two thirds of the time of these short runs

    def save(self, path: Path) -> Path:
        """Write the job for `python -m tests.faults.child`."""
        path.write_text(json.dumps(asdict(self)))
        return path


def run_job(job: Job) -> None:
    """Run the command. It ends the process with the command's exit code."""
    os.environ.update(job.environment)
    os.chdir(job.folder)
    if job.clock:
        now = time.time
        time.time = lambda: now() + job.clock
    if not job.draws:
        tinyllava.commands.follow.draw_curve = lambda *arguments: None
    Striker(job.points, Path(job.steps)).install()
    cli.main(job.arguments)


def run_forked(job: Job) -> None:
    """`run_job` in a fork, as the leader of a group of its own: its data workers can be killed with it."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own: data workers are its children
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # nohup and `&` in a script ignore some of them
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    target = os.open(job.printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    try:
        run_job(job)
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text())
    run_job(Job(**{**content, "points": [Point(**point) for point in content["points"]]}))
