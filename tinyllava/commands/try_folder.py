"""Write to a folder, and lock a file in it twice: `tinyllava doctor` runs this file in a process of its own.

python try_folder.py FOLDER

A network folder whose server is gone blocks a process for ever. The doctor then stops waiting for this one. It writes
`{"speed": MB a second, "locks": whether they work}` or `{"error": reason}`. It imports nothing of ours, to start fast.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

BLOCK, BLOCKS, SECONDS = 4 << 20, 32, 2.0  # at most 128 MiB and two seconds


def measure_writing(folder: Path) -> float:
    """Megabytes a second that reach the disk."""
    block = os.urandom(BLOCK)  # zeros would be compressed on some file systems
    with tempfile.TemporaryFile(dir=folder) as file:
        start, count = time.perf_counter(), 0
        while count < BLOCKS and time.perf_counter() - start < SECONDS:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            count += 1
        return count * BLOCK / 1e6 / (time.perf_counter() - start)


def try_locks(folder: Path) -> str:
    """`work`, or what is wrong: a second lock of a file must be refused while the first one is held."""
    try:
        import fcntl
    except ImportError:  # Windows
        return "work"
    with tempfile.NamedTemporaryFile(dir=folder) as first, open(first.name, "rb+") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"fail: {error.strerror}"
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return "work"
        return "fail: two processes can hold one"


if __name__ == "__main__":
    try:
        report = {"speed": measure_writing(Path(sys.argv[1])), "locks": try_locks(Path(sys.argv[1]))}
    except OSError as problem:
        report = {"error": problem.strerror or str(problem)}
    sys.stdout.write(json.dumps(report))
