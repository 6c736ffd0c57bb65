"""Find the tokenised rows that can be trained on.

Image files are checked before training starts, so that a missing file does not stop a run after hours.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow.compute as pc

from tinyllava.data.bad_records import SHORTENED, BadRecords
from tinyllava.data.images import find_file_fault
from tinyllava.data.sample import SampleError
from tinyllava.data.sources import Source

THREADS = 32  # on a network disk, a thread waits about a millisecond for each file
FILES_AT_A_TIME = 1000  # in one task of a thread


def find_usable(source: Source, table: datasets.Dataset, bad: BadRecords) -> np.ndarray:
    """Which rows can be trained on, bool [n]. The others are counted in `bad`. It checks every image file."""
    ids, problems, details, images = (table.data.column(name) for name in ("id", "problem", "detail", "images"))
    usable = problems.is_null().to_numpy()  # a copy of the column, which is changed below
    for row in map(int, np.flatnonzero(~usable)):
        bad.add(problems[row].as_py(), ids[row].as_py(), details[row].as_py())
    for row in map(int, np.flatnonzero(read_column(table, "shortened"))):
        bad.add(SHORTENED, ids[row].as_py(), details[row].as_py())
    names = pc.unique(pc.list_flatten(images)).to_pylist()
    faults = find_file_faults(filter(None, names), source.roots)
    if faults:
        for row in map(int, np.flatnonzero(usable)):
            error = next((faults[name] for name in images[row].as_py() if name in faults), None)
            if error is not None:
                bad.add(error.kind, ids[row].as_py(), error.text)
                usable[row] = False
    return usable


def find_file_faults(names: Iterable[str], roots: Sequence[str]) -> dict[str, SampleError]:
    """The images that are missing, empty or not allowed, with the error of each."""
    names = sorted(names)

    def search(chunk: list[str]) -> list[tuple[str, SampleError | None]]:
        return [(name, find_file_fault(name, roots)) for name in chunk]

    with ThreadPoolExecutor(THREADS) as pool:
        starts = range(0, len(names), FILES_AT_A_TIME)
        results = pool.map(search, (names[start : start + FILES_AT_A_TIME] for start in starts))
        return {name: error for chunk in results for name, error in chunk if error is not None}


def read_column(table: datasets.Dataset, name: str) -> np.ndarray:
    """A column of numbers as an array, without creating Python objects."""
    return table.data.column(name).to_numpy()
