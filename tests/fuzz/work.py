"""What one process of `python -m tests.fuzz` does. faulthandler writes where a C library crashes."""

import ctypes
import faulthandler
import pickle
import signal
import sys
from mmap import mmap
from pathlib import Path

from tests.fuzz.harness import PROCESSES, run_target

SET_DEATH_SIGNAL = 1  # Linux: the process gets a signal when its parent ends, however that ends
CURRENT = 8192  # bytes of the file with the input that is being tried


def main(name: str, seconds: str, chunks: str, seed: str, folder: str) -> None:
    place = Path(folder)
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    faulthandler.enable()
    (place / "scratch").mkdir()
    (place / "current").write_bytes(bytes(CURRENT))
    with (place / "current").open("r+b") as file:
        limits = float(seconds), int(chunks) or None
        tallies = run_target(name, *limits, int(seed), PROCESSES, place / "scratch", mmap(file.fileno(), 0))
    (place / "report").write_bytes(pickle.dumps(tallies))


if __name__ == "__main__":
    main(*sys.argv[1:])
