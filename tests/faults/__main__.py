"""Play the faults, two at a time, and print the table. `python -m tests.faults --help`"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Before torch is imported anywhere: one thread in each process, so that forks are safe and runs equal bit for bit.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ.update(ONE_THREAD, TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", COLUMNS="200")
PRIVATE = "TINYLLAVA_FAULTS_MOUNTS"  # set in a process that has mounts of its own


def main() -> int:
    """Print the table and return the exit code: 1 if a row failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--only", default="", help="only rows whose name contains this regular expression")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/scale.md")
    parser.add_argument("--jobs", type=int, default=2, help="faults played at a time (default 2)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the files of the rows that fail in this folder")
    parser.add_argument("--list", action="store_true", help="only list the faults")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C: no process and no file is left
    enter_own_mounts()

    from tests.faults import table
    from tests.faults.faults import list_faults

    faults = [each for each in list_faults() if re.search(given.only, f"{each.name}: {each.where}", re.I)]
    if given.list:
        sys.stdout.writelines(f"{each.name}: {each.where} ({each.variant})\n" for each in faults)
        return 0
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        played = play_all(faults, Path(folder), given.jobs, given.keep)
    rows = table.make_rows(played)
    show(rows, given.markdown)
    failed = sum(bool(each.failure) for each in played)
    skipped = sum(bool(each.skipped) for each in played)
    passed = len(played) - failed - skipped
    seconds = time.monotonic() - begun
    sys.stderr.write(f"{passed} passed, {failed} failed, {skipped} skipped in {seconds / 60:.1f} minutes\n")
    return int(failed > 0)


def enter_own_mounts() -> None:
    """Start again where mounts are this process's own: no other process sees them, and none is left behind."""
    if PRIVATE in os.environ:
        return
    command = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    is_allowed = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    os.environ[PRIVATE] = "1" if is_allowed else ""
    if is_allowed:
        os.execvp("unshare", [*command, sys.executable, "-m", "tests.faults", *sys.argv[1:]])


def play_all(faults: list, folder: Path, jobs: int, keep: Path | None) -> list:
    """Play the undisturbed runs, then all faults."""
    from tests.faults.faults import measure_variants, play
    from tests.faults.scene import FORK

    FORK.set_forkserver_preload(["tests.faults.child"])
    with ThreadPoolExecutor(jobs) as pool:
        measures = measure_variants({each.variant for each in faults}, folder, pool)

        def play_one(numbered: tuple[int, object]) -> object:
            number, fault = numbered
            each = play(fault, folder / str(number), measures, keep)
            text = f"{fault.name}: {fault.where}"
            result = each.failure or each.skipped or "passed"
            sys.stderr.write(f"{number + 1}/{len(faults)} {text} ({each.seconds:.0f} s): {result}\n")
            return each

        try:
            return list(pool.map(play_one, enumerate(faults)))
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, only the rows that run are played to their end


def show(rows: list[list[str]], markdown: bool) -> None:
    """Print the table."""
    from rich.console import Console

    from tests.faults import table

    if markdown:
        sys.stdout.write(f"{table.make_markdown(rows)}\n")
    else:
        Console(width=200).print(table.make_table(rows))


if __name__ == "__main__":
    sys.exit(main())
