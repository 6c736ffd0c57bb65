"""Hashes of the files of a checkpoint: recorded when it is saved, compared when it is loaded.

    "files": {"config.json": {"bytes": 1644, "xxh3_128": "5e0c..."}, ...}, ..., "xxh3_128": "91ab..."

The last hash is that of the record itself, so a record that somebody edits is noticed too. xxh3_128 reads 1.5 GiB in
0.21 s of CPU time; sha256 needs 1.30 s with the CPU's SHA instructions, and blake2b 2.3 s. It finds damage, and files
of another checkpoint. It does not stop a forger, who could write a new record in any case: sign the files for that.

Hashes of large files are compared once for each state of a file (inode, size, times). An empty file in the cache marks
a state that was compared. Where the cache cannot be written, files are compared at every load.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from xxhash import xxh3_128

from tinyllava.cache import digest, find_cache_root
from tinyllava.errors import UserError
from tinyllava.files import find_read_files, is_inside, read_json

RECORD = "tinyllava.json"  # of a checkpoint
ALGORITHM = "xxh3_128"  # the key of every hash in a record, so that a later version can use another
BLOCK = 1 << 20
SMALL = 64 << 20  # bytes: reading such a file takes about 10 ms, no more than looking up a mark
RECENT = 2.0  # seconds. A change so soon after another one can keep a file's times: FAT stores them in steps of 2 s
MARKS = "verified"  # their folder in the cache
EDITABLE = ("*.json", "*.jinja", "*.txt")  # people edit these: settings of generation, chat templates, tokenizers
FOR_PEOPLE = ("README.md",)  # may be edited at any time; hidden files, such as .DS_Store, are not recorded either


def hash_content(path: Path) -> str:
    """The hash of a file's content: 32 hex digits."""
    hasher, block = xxh3_128(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            hasher.update(block[:count])
    return hasher.hexdigest()


# -- writing -----------------------------------------------------------------------------------------------------------


def hash_directory(directory: Path, sources: Iterable[Path] = (), skipped: Iterable[str] = ()) -> dict[str, Any]:
    """{name: its size and hash} of the files in a checkpoint, without the record and the names in `skipped`.

    sources: files of earlier checkpoints, of which files here can be links or copies. Their recorded hashes are taken
    over: a frozen LLM is not read again at every save, and damage since then is not recorded as right.
    """
    known = {source.name: source for source in sources}
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        is_hidden = any(step.startswith(".") for step in PurePath(name).parts)
        if is_hidden or name in (RECORD, *FOR_PEOPLE, *skipped):
            continue
        recorded = _find_recorded(path, known[name]) if name in known else None
        files[name] = recorded or {"bytes": path.stat().st_size, ALGORITHM: hash_content(path)}
    return files


def _find_recorded(path: Path, source: Path) -> dict[str, Any] | None:
    """What the record beside `source` says of it, if `path` is the same file or a copy; None without a hash."""
    ours, theirs = path.stat(), source.stat()
    if (ours.st_size, ours.st_mtime_ns) != (theirs.st_size, theirs.st_mtime_ns):
        return None
    try:
        entry = read_json(source.parent / RECORD)["files"][source.name]
    except (UserError, KeyError, TypeError):
        return None
    return entry if isinstance(entry, dict) and entry.get("bytes") == ours.st_size and ALGORITHM in entry else None


def seal(record: Mapping[str, Any]) -> str:
    """The text of a record, with a hash of its other content at its end."""
    content = {name: value for name, value in record.items() if name != ALGORITHM}
    digits = xxh3_128(json.dumps(content, indent=2).encode()).hexdigest()
    return json.dumps({**content, ALGORITHM: digits}, indent=2) + "\n"


# -- comparing ---------------------------------------------------------------------------------------------------------

Compare = Callable[[Path, Any], str | None]  # a file, what is recorded of it -> what is wrong with it


def compare_size(path: Path, recorded: Any) -> str | None:
    """What is wrong with the size of a file; None if nothing is. recorded: a size, or an entry of `hash_directory`."""
    expected = recorded.get("bytes") if isinstance(recorded, dict) else recorded
    try:
        actual = path.stat().st_size if path.is_file() else None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if actual is None:
        return "is missing"
    return None if actual == expected else f"has {actual} bytes, expected {expected}"


def compare_hash(path: Path, recorded: Any) -> str | None:
    """What is wrong with a file; None if nothing is. A file in a state that was compared before is not read again."""
    return compare_size(path, recorded) or _compare_content(path, recorded)


def compare_again(path: Path, recorded: Any) -> str | None:
    """As `compare_hash`, but always reads the file."""
    return compare_size(path, recorded) or _compare_content(path, recorded, always=True)


def _compare_content(path: Path, recorded: Any, always: bool = False) -> str | None:
    if not isinstance(recorded, dict):
        return None  # records of earlier versions have sizes only
    before, expected = path.stat(), str(recorded.get(ALGORITHM))
    mark = _find_mark(before, expected)
    if mark and not always and os.path.exists(mark):
        return None
    try:
        actual = hash_content(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if actual != expected:
        return f"has changed since it was saved (its {ALGORITHM} is {actual[:12]}, expected {expected[:12]})"
    is_settled = time.time() - max(before.st_mtime, before.st_ctime) > RECENT
    if mark and is_settled and _find_mark(path.stat(), expected) == mark:
        with suppress(OSError):  # a read-only or full home
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    return None


def _find_mark(state: os.stat_result, expected: str) -> Path | None:
    """The mark of a large file in this state; None for a small file, and without a home."""
    if state.st_size < SMALL:
        return None
    # The time of the last change (ctime) cannot be set: it also shows a change by a tool that puts the other time back.
    parts = state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
    with suppress(RuntimeError):  # a container's user without an entry in passwd and without $HOME
        return find_cache_root() / MARKS / digest(*parts, expected)
    return None


def list_damage(
    directory: Path, record: Mapping[str, Any], lists: Iterable[str] = ("files",), compare: Compare = compare_hash
) -> Iterator[str]:
    """Everything that is wrong in a checkpoint, a text each: damaged, missing and added files, and a changed record.

    lists: the lists of files in the record that are compared. Files that somebody added are fine, unless a library
    would load them with the model.
    """
    if not is_sealed(directory / RECORD, record):
        yield f"{RECORD} has changed since it was written"
        return
    known: set[str] = set()
    for files in (record.get(name) for name in ("files", "training_state")):
        known |= set(files or {})
    for files in (record.get(name, {}) for name in lists):
        for name, recorded in files.items():
            if not is_inside(name):
                yield f"{name!a} is a path outside the checkpoint"
            elif fault := compare(directory / name, recorded):
                yield f"{name} {fault}"
    for path in find_read_files(directory):
        if path.name not in known:
            yield f"{path.name} is not in the record, but libraries load it with the model: remove it"


def is_editable(name: str) -> bool:
    """Whether people edit a file of a checkpoint by hand. An index of weights is no such file."""
    return any(fnmatchcase(name, pattern) for pattern in EDITABLE) and not name.endswith(".index.json")


def find_edits(directory: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """{name: what the record should say of it} of the editable files of a checkpoint that have changed or are new."""
    known = record["files"]
    names = {name for name in known if is_inside(name)} | {
        path.name for path in find_read_files(directory)
    }  # an adapter is no edit
    # An adapter that somebody added is no edit: it would be loaded with the model.
    names -= {RECORD, *record.get("training_state", {}), *({"adapter_config.json"} - known.keys())}
    edits = {}
    for path in (directory / name for name in sorted(names) if is_editable(name) and (directory / name).is_file()):
        name, size = path.relative_to(directory).as_posix(), path.stat().st_size
        if name not in known or compare_again(path, known[name]):
            edits[name] = size if record.get("format") == 1 else {"bytes": size, ALGORITHM: hash_content(path)}
    return edits


def find_damage(directory: Path, files: Any) -> str | None:
    """The first of some recorded files that is missing or has another size; None if there is none. It reads no file."""
    if not isinstance(files, dict):
        return f"{RECORD} cannot be read"
    faults = ((name, compare_size(directory / name, recorded)) for name, recorded in files.items())
    return next((f"{name} {fault}" for name, fault in faults if fault), None)


def is_sealed(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a record has not changed since it was written. Those of format 1 have sizes and no hash of themselves."""
    lists = [record.get("files"), record.get("training_state", {})]
    if not all(isinstance(files, dict) for files in lists):
        return False
    entries = [entry for files in lists for entry in files.values()]
    if record.get("format") == 1 and ALGORITHM not in record:
        return bool(entries) and all(isinstance(entry, int) for entry in entries)
    return all(isinstance(entry, dict) for entry in entries) and path.read_bytes() == seal(record).encode()
