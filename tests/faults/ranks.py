"""Two processes under torchrun, of which one dies or all are stopped. The run is resumed by one process."""

import os
import signal
import time
from collections.abc import Iterator

from tests.faults.points import Point
from tests.faults.scene import SAVE_STEPS, Outcome, Result, Row, Scene, expect
from tests.faults.table import Fault

LIMIT = 60.0  # seconds in which the others must end
TOLERANCE = 1e-4  # two processes add in another order than one


def kill_rank(rank: int) -> Row:
    """One rank is killed."""

    def row(scene: Scene, measure: Result) -> Outcome:
        first = scene.start_ranks(Point("end", "finetune/8", "kill", rank=rank))
        first.wait_for("end finetune 7" if rank == 0 else "end finetune 8")
        begun = time.monotonic()
        first.wait(LIMIT)
        seconds = time.monotonic() - begun
        expect(first.code not in (0, None), f"exit code {first.code}")
        outcome = scene.compare(first, scene.finish(), measure, TOLERANCE)
        expect(outcome.repeated <= SAVE_STEPS, f"{outcome.repeated} steps are repeated")
        note = f"the other rank ends within {LIMIT:.0f} s, here {seconds:.0f} s"
        return Outcome(first, outcome.repeated, outcome.difference, note)

    return row


def stop_ranks(scene: Scene, measure: Result) -> Outcome:
    """torchrun gets SIGTERM, as from a scheduler, and passes it to its ranks."""
    first = scene.start_ranks()
    first.wait_for("end finetune 5")
    os.kill(first.process.pid, signal.SIGTERM)
    first.wait(LIMIT)
    expect(first.code not in (0, None), f"exit code {first.code}")
    outcome = scene.compare(first, scene.finish(), measure, TOLERANCE)
    expect(outcome.repeated == 0, f"{outcome.repeated} steps are repeated, expected none")
    return outcome


def list_rank_faults() -> Iterator[Fault]:
    """Faults of two processes."""
    yield Fault("one of two ranks killed", "rank 0, in a step", kill_rank(0))
    yield Fault("one of two ranks killed", "rank 1, in a step", kill_rank(1))
    yield Fault("SIGTERM to torchrun", "in a step", stop_ranks)
