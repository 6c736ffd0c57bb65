"""Try inputs on one target within a time, and reduce each finding to its smallest input.

Hypothesis makes the inputs and shrinks them. A finding is anything but our own error: another exception, an input that
takes too long or too much memory, or a write to standard output.
"""

import faulthandler
import gc
import math
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import HypothesisException
from hypothesis.strategies import SearchStrategy

from tinyllava.errors import UserError

PROCESSES = 2
CPU_SECONDS, WALL_SECONDS = 10, 60  # of one input; a loaded machine slows only the second
TICKS = 5  # of the timers, in the time of one input
SLOW = 0.01  # seconds. In less, no input fills GROWTH
GROWTH = 512 << 20  # bytes that one input may add to the most memory that the process ever had
ADDRESS_SPACE = 4 << 30  # bytes beyond what the target has after its set-up; an allocation above fails
SHRINK_SECONDS = 20
CHUNK = 500  # inputs of one seed: a finding is found again by trying as many
ROOT = Path(__file__).parents[2]
SHOWN = 1500  # characters of an input in the report


class Case(NamedTuple):
    """One way into the package: the inputs to try, and the call that may raise UserError and nothing else.

    share: of the time of its target, relative to the other cases.
    """

    name: str
    inputs: SearchStrategy[Any]
    run: Callable[[Any], object]
    share: float = 1


class Finding(NamedTuple):
    """What went wrong, where, how often, with which input, and the seed whose first chunk finds it."""

    case: str
    kind: str
    place: str
    message: str
    seed: int
    times: int
    example: str


class OverLimitError(BaseException):
    """An input took too long. No handler of the code that is tried may catch it."""


class FindingError(Exception):
    """Tells Hypothesis that an input fails as the finding that it shrinks."""


@dataclass
class Tally:
    """What the inputs of one case came to."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)


class Fault(NamedTuple):
    """One input's fault: its kind, the place in our code, and the message."""

    kind: str
    place: str
    message: str


def run_target(
    name: str, seconds: float, most: int | None, first_seed: int, step: int, folder: Path, current: mmap
) -> dict[str, Tally]:
    """Try the cases of a target in turn: each for its share of `seconds`, or `most` chunks of each, if given.

    The k-th chunk of a case has the seed first + k * step. current: memory that outlives this process and holds the
    input that is being tried.
    """
    start = time.monotonic()
    cases = import_module(f"tests.fuzz.targets.{name}").build(folder)
    guard, whole = Guard(current), sum(case.share for case in cases)
    left = math.inf if most else max(seconds / 4, seconds - (time.monotonic() - start))  # the set-up counts too
    ends = {case.name: left * case.share / whole for case in cases}
    tallies = {case.name: Tally() for case in cases}
    chunks = Counter[str]()
    while True:
        case = min(cases, key=lambda case: chunks[case.name] if most else tallies[case.name].seconds / case.share)
        if chunks[case.name] == most or tallies[case.name].seconds >= ends[case.name]:
            return tallies
        _run_chunk(case, tallies[case.name], guard, first_seed + chunks[case.name] * step, ends[case.name])
        chunks[case.name] += 1


def _run_chunk(case: Case, tally: Tally, guard: "Guard", chunk_seed: int, seconds: float) -> None:
    """Try one chunk of inputs, and shrink the first input of each new finding."""
    start, before, new = time.monotonic(), tally.seconds, Counter[tuple[str, str]]()
    faults: dict[tuple[str, str], tuple[Fault, Any]] = {}

    def attempt(value: Any) -> None:
        if before + time.monotonic() - start > seconds:
            return
        tally.inputs += 1
        fault, accepted = guard.call(case, value, chunk_seed)
        tally.accepted += accepted
        tally.refused += not accepted and fault is None
        if fault is not None:
            new[fault[:2]] += 1
            faults.setdefault(fault[:2], (fault, value))

    _try_inputs(case, attempt, chunk_seed, (Phase.generate,))
    tally.seconds = before + time.monotonic() - start
    for key, times in new.items():
        if (known := tally.findings.get(key)) is not None:
            tally.findings[key] = known._replace(times=known.times + times)
            continue
        fault, value = faults[key]
        if fault.kind not in ("time", "memory"):  # trying again would take as long
            value = _shrink(case, guard, chunk_seed, key, value)
        tally.findings[key] = Finding(case.name, *fault, chunk_seed, times, show(value))


def _shrink(case: Case, guard: "Guard", chunk_seed: int, key: tuple[str, str], value: Any) -> Any:
    """The smallest input with this finding that Hypothesis reaches in SHRINK_SECONDS."""
    end, smallest = time.monotonic() + SHRINK_SECONDS, [value]

    def attempt(value: Any) -> None:
        if time.monotonic() > end:
            return
        fault, _ = guard.call(case, value, chunk_seed)
        if fault is not None and fault[:2] == key:
            if len(repr(value)) <= len(repr(smallest[0])):
                smallest[0] = value
            raise FindingError

    with suppress(FindingError, HypothesisException):  # the second: the last try passed, as the time was over
        _try_inputs(case, attempt, chunk_seed, (Phase.generate, Phase.shrink))
    return smallest[0]


def _try_inputs(case: Case, attempt: Callable[[Any], None], chunk_seed: int, phases: tuple[Phase, ...]) -> None:
    options = {"database": None, "deadline": None, "report_multiple_bugs": False, "print_blob": False}
    chunk = settings(max_examples=CHUNK, phases=phases, suppress_health_check=list(HealthCheck), **options)
    seed(chunk_seed)(chunk(given(case.inputs)(attempt)))()


class Guard:
    """Calls a case with one input, under limits on time, memory and output, and without a network."""

    def __init__(self, current: mmap) -> None:
        self.current = current
        # Timers tick all the time. To set them for each input takes longer than most inputs, as do all system calls.
        for number, timer, most in (
            (signal.SIGPROF, signal.ITIMER_PROF, CPU_SECONDS),
            (signal.SIGALRM, signal.ITIMER_REAL, WALL_SECONDS),
        ):
            signal.signal(number, self._count_tick)
            signal.setitimer(timer, most / TICKS, most / TICKS)
        self.is_trying, self.watched, self.peak = False, -math.inf, _read_peak()
        self.ticks = Counter[int]()
        _limit_address_space()
        socket.socket.connect = socket.getaddrinfo = _refuse_connection
        self.output = os.memfd_create("output")  # standard output of C libraries too
        sys.stdout.flush()
        os.dup2(self.output, 1)
        self.written = 0
        gc.freeze()  # what the set-up made is not searched again

    def call(self, case: Case, value: Any, chunk_seed: int) -> tuple[Fault | None, bool]:
        """What is wrong, and whether the input was accepted."""
        note = f"{case.name}\t{chunk_seed}\t{show(value)}".encode("utf-8", "backslashreplace")[: len(self.current) - 1]
        self.current[: len(note) + 1] = note + b"\0"
        fault, accepted = None, False
        start, self.ticks = time.monotonic(), Counter[int]()
        if start > self.watched + WALL_SECONDS / 4:  # not at each input: it starts a thread
            faulthandler.dump_traceback_later(3 * WALL_SECONDS, exit=True)  # for C code, which sees no signal
            self.watched = start
        try:
            self.is_trying = True
            case.run(value)
            accepted = True
        except UserError as error:
            fault = _check_message(error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            fault = _describe(error)
        finally:
            self.is_trying = False
        growth = 0
        if time.monotonic() - start > SLOW:
            before, self.peak = self.peak, _read_peak()
            growth = self.peak - before
        if fault is None and growth > GROWTH:
            fault = Fault("memory", case.name, f"{growth >> 20} MiB more")
        sys.stdout.flush()
        written = os.fstat(self.output).st_size
        if written > self.written and fault is None:
            text = os.pread(self.output, 200, self.written)
            fault = Fault("output", case.name, f"wrote to standard output: {text!r}")
        self.written = written
        return fault, accepted and fault is None

    def _count_tick(self, number: int, frame: object) -> None:
        self.ticks[number] += 1
        if self.is_trying and self.ticks[number] > TICKS:
            self.ticks.clear()
            raise OverLimitError(f"over {CPU_SECONDS} s of CPU time or {WALL_SECONDS} s")


def _check_message(error: UserError) -> Fault | None:
    """What is wrong with a message of ours: it is as long as its input."""
    text = str(error)
    if len(text) > 4000 or text.count("\n") > 3:
        return Fault("message", _find_place(error), f"{len(text)} characters, {text.count(chr(10))} line breaks")
    return None


def _describe(error: BaseException) -> Fault:
    kind = {OverLimitError: "time", MemoryError: "memory"}.get(type(error), type(error).__name__)
    return Fault(kind, _find_place(error), f"{error!s:.300}")


def _find_place(error: BaseException) -> str:
    """The deepest line of ours under an error: of the package, or else of the target."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    ours = [frame for frame in frames if frame.filename.startswith(f"{ROOT}/tinyllava/")]
    ours = ours or [frame for frame in frames if frame.filename.startswith(f"{ROOT}/")] or frames
    if not ours:
        return "nowhere"
    return f"{os.path.relpath(ours[-1].filename, ROOT)}:{ours[-1].lineno} {ours[-1].name}"


def show(value: Any) -> str:
    """An input as Python writes it; of a long one both ends."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]} ({len(text)} characters)"


def _limit_address_space() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE, resource.RLIM_INFINITY))


def _read_peak() -> int:
    """The most memory that the process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _refuse_connection(*arguments: object, **options: object) -> NoReturn:
    raise OSError("fuzzers have no network")
