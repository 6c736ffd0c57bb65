"""All faults, and how one is played."""

import os
import shutil
import time
import traceback
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

from tests.faults.data import list_data_faults
from tests.faults.directories import list_directory_faults
from tests.faults.disks import list_disk_faults
from tests.faults.kills import list_kills, list_stops
from tests.faults.ranks import list_rank_faults
from tests.faults.scene import Failure, Result, Scene, Skip, expect
from tests.faults.table import Fault, Played, shorten


def list_faults() -> list[Fault]:
    """All faults, in the order of the table."""
    parts = (list_kills, list_stops, list_disk_faults, list_data_faults, list_directory_faults, list_rank_faults)
    return [fault for part in parts for fault in part()]


def measure_variants(variants: Iterable[str], folder: Path, pool: Executor) -> dict[str, Result]:
    """The results of the undisturbed runs."""

    def measure(variant: str) -> Result:
        scene = Scene(folder / f"undisturbed-{variant}", variant)
        start = scene.start().wait()
        expect(start.code == 0, f"the undisturbed run ({variant}) exits with {start.code}: {start.text[-2000:]}")
        return Result.read(scene.run)

    names = sorted(variants)
    return dict(zip(names, pool.map(measure, names), strict=True))


BROKEN = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def play(fault: Fault, folder: Path, measures: Mapping[str, Result], keep: Path | None) -> Played:
    """Play one fault in a folder that is deleted, or moved to `keep` if the fault's row fails."""
    begun = time.monotonic()
    played = Played(fault)
    scene = Scene(folder, fault.variant)
    try:
        if fault.mounts and not os.environ.get("TINYLLAVA_FAULTS_MOUNTS"):
            raise Skip("this user may not mount file systems (`unshare --map-root-user --mount`)")
        played.outcome = fault.play(scene, measures[fault.variant])
    except Skip as reason:
        played.skipped = str(reason)
    except Failure as failure:
        played.failure = shorten(str(failure), str(folder))
    except BROKEN:  # one broken row must not hide the others
        played.failure = shorten(traceback.format_exc().strip().replace("\n", " "), str(folder), 400)
    if played.outcome:
        message = shorten(played.outcome.message or played.outcome.first.message, str(folder))
        code = "killed" if played.outcome.first.code == -9 else f"exit {played.outcome.first.code}"
        played.outcome = replace(played.outcome, message=f"{code}: {message}" if message else code)
    if keep and played.failure:
        shutil.copytree(folder, keep / folder.name, symlinks=True, dirs_exist_ok=True)
    scene.close()
    played.seconds = time.monotonic() - begun
    return played
