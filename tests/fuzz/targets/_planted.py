"""A target with planted faults, one of each kind, and a case without: the test of the harness asks for it."""

import time
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz import harness
from tests.fuzz.harness import Case
from tinyllava.errors import UserError


def build(folder: Path) -> list[Case]:
    harness.CPU_SECONDS, harness.GROWTH = 0.2, 64 << 20  # to be found in a moment
    numbers = st.integers(0, 99)
    return [
        Case("planted: error", st.dictionaries(st.sampled_from("abc"), numbers), read_sum),
        Case("planted: time", st.integers(0, 3), wait),
        Case("planted: memory", st.integers(0, 1), fill),
        Case("planted: output", numbers, chatter),
        Case("planted: nothing", numbers, refuse_odd),
    ]


def read_sum(numbers: dict[str, int]) -> int:
    if not numbers:
        raise UserError("there are no numbers. Give some.")
    return numbers["a"] + 1 if max(numbers.values()) > 50 else 0


def wait(number: int) -> None:
    end = time.process_time() + 60 * (number == 3)
    while time.process_time() < end:
        pass


def fill(number: int) -> None:
    bytearray(b"x") * ((256 << 20) * number)


def chatter(number: int) -> None:
    if number == 7:
        print("noise")


def refuse_odd(number: int) -> None:
    if number % 2:
        raise UserError("odd")
