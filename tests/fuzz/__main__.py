"""python -m tests.fuzz [--minutes 10] [--target records] [--seed 0]: run fuzzers, and print a table of what they found.

Each target is tried by two processes at a time. Exit code 1: something is open, with its smallest input and its seed.
"""

import argparse
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.harness import CHUNK, PROCESSES, Finding, Tally

TARGETS = Path(__file__).parent / "targets"
COLUMNS = ("target", "inputs", "inputs/s", "accepted", "refused", "open findings")
SHARES = {"images": 4, "records": 2, "checkpoints": 0.7, "sessions": 0.5}  # of the time; of all others 1
ROW = "{:28}{:>10}{:>10}{:>10}{:>10}{:>15}"


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C, it removes the folder of the workers
    names = sorted(path.stem for path in TARGETS.glob("[!_]*.py"))
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Try inputs that nobody would write.")
    parser.add_argument("--minutes", type=float, default=10, help="minutes for all targets together")
    parser.add_argument("--target", help=f"one of {', '.join(names)}; default: all")
    parser.add_argument("--chunks", type=int, default=0, help=f"try so many times {CHUNK} inputs, whatever the time")
    parser.add_argument("--seed", type=int, default=0, help="decides all inputs")
    options = parser.parse_args()
    if options.target and not (TARGETS / f"{options.target}.py").is_file():
        parser.error(f"there is no target {options.target}. Known: {', '.join(names)}.")
    chosen = [options.target] if options.target else names
    table: dict[str, Tally] = {}
    whole = sum(SHARES.get(name, 1) for name in chosen)
    for name in chosen:
        seconds = options.minutes * 60 * SHARES.get(name, 1) / whole
        tallies = run_processes(name, seconds, options.chunks, options.seed)
        table |= tallies
        for case, tally in tallies.items():
            print(f"{case}: {tally.inputs:,} inputs, {len(tally.findings)} findings", flush=True)
            for finding in tally.findings.values():
                print_finding(name, finding)
    print_table(table)
    return int(any(tally.findings for tally in table.values()))


def run_processes(name: str, seconds: float, chunks: int, seed: int) -> dict[str, Tally]:
    """Run a target in PROCESSES processes, each with seeds of its own, and add up what they report."""
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="tinyllava-fuzz-") as place:
        folders = [Path(place, str(number)) for number in range(PROCESSES)]
        processes = []
        for number, folder in enumerate(folders):
            folder.mkdir()
            command = [sys.executable, "-m", "tests.fuzz.work", name]
            command += [str(seconds), str(chunks), str(seed + number), str(folder)]
            with (folder / "errors").open("w") as errors:
                environment = os.environ | settings | {"TINYLLAVA_CACHE": str(folder / "cache")}
                processes.append(subprocess.Popen(command, env=environment, stderr=errors))
        total: dict[str, Tally] = {}
        for number, (process, folder) in enumerate(zip(processes, folders, strict=True)):
            process.wait()
            report = folder / "report"
            if report.is_file():
                add_tallies(total, pickle.loads(report.read_bytes()))
            else:
                crash = describe_crash(name, process.returncode, folder, seed + number)
                add_tallies(total, {name: Tally(findings={("crash", crash.place): crash})})
    return total


def add_tallies(total: dict[str, Tally], more: dict[str, Tally]) -> None:
    for case, tally in more.items():
        known = total.setdefault(case, Tally())
        for key, finding in tally.findings.items():
            twin = known.findings.get(key)
            shorter = min(filter(None, (finding, twin)), key=lambda each: len(each.example))
            known.findings[key] = shorter._replace(times=finding.times + (twin.times if twin else 0))
        for figure in ("inputs", "accepted", "refused", "seconds"):
            setattr(known, figure, getattr(known, figure) + getattr(tally, figure))


def describe_crash(name: str, code: int, folder: Path, seed: int) -> Finding:
    """The finding for a process that ended without a report: the input that it tried last."""
    path = folder / "current"
    current = path.read_bytes().partition(b"\0")[0].decode("utf-8", "replace") if path.is_file() else ""
    case, _, rest = current.partition("\t")
    chunk_seed, _, example = rest.partition("\t")
    trace = (folder / "errors").read_text(errors="replace")
    number = int(chunk_seed) if chunk_seed.isdigit() else seed
    return Finding(case or name, "crash", f"exit code {code}", f"{trace[:300]} ... {trace[-1200:]}", number, 1, example)


def print_finding(target: str, finding: Finding) -> None:
    times = f"{finding.times} times" if finding.times > 1 else "once"
    print(f"\nFOUND in {finding.case}: {finding.kind} at {finding.place}, {times}")
    print(f"  {finding.message}".encode("utf-8", "backslashreplace").decode())
    print(f"  smallest input: {finding.example}".encode("utf-8", "backslashreplace").decode())
    print(f"  again: make fuzz TARGET={target} SEED={finding.seed} CHUNKS=1\n", flush=True)


def print_table(table: dict[str, Tally]) -> None:
    print(ROW.format(*COLUMNS))
    total: Counter[str] = Counter()
    for case, tally in table.items():
        speed = tally.inputs / tally.seconds * PROCESSES if tally.seconds else 0
        figures = (tally.inputs, tally.accepted, tally.refused, len(tally.findings))
        total.update(dict(zip(("inputs", "accepted", "refused", "findings"), figures, strict=True)))
        inputs, *more, findings = (f"{figure:,}" for figure in figures)
        print(ROW.format(case, inputs, f"{speed:,.0f}", *more, findings))
    inputs, *more, findings = (f"{total[name]:,}" for name in ("inputs", "accepted", "refused", "findings"))
    print(ROW.format("all", inputs, "", *more, findings))


if __name__ == "__main__":
    sys.exit(main())
