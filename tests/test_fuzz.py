"""The harness of the fuzzers finds planted faults and reports each with its smallest input."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_fuzzers(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_planted_faults_are_found_and_reported() -> None:
    done = run_fuzzers("--chunks", "1", "--target", "_planted", "--seed", "5")
    assert done.returncode == 1, done.stdout + done.stderr
    found = re.findall(r"FOUND in planted: (\w+): (\w+) at (\S+)", done.stdout)
    assert {(case, kind) for case, kind, _ in found} == {
        ("error", "KeyError"),
        ("time", "time"),
        ("memory", "memory"),
        ("output", "output"),
    }, done.stdout
    report = done.stdout.partition("FOUND in planted: error")[2].partition("FOUND")[0]
    assert "_planted.py" in report and re.search(r"smallest input: \{'[bc]': 51\}", report), report
    seed = re.search(r"again: make fuzz TARGET=_planted SEED=(\d+)", report)[1]
    assert int(seed) in range(5, 100)
    table = {row.split("  ")[0]: row.split()[2:] for row in done.stdout.splitlines() if row.startswith("planted: ")}
    inputs, _, accepted, refused, findings = table["planted: nothing"]
    assert (inputs, accepted, refused, findings) == ("200", "100", "100", "0"), table


def test_an_unknown_target_is_refused() -> None:
    done = run_fuzzers("--target", "recods")
    assert done.returncode == 2 and "there is no target recods. Known: answers, checkpoints" in done.stderr
