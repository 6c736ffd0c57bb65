"""The cache of prepared data: converted annotations, tokenised samples, the embedded default dataset.

Everything in it can be made again, so `rm -r ~/.cache/tinyllava` is always safe. TINYLLAVA_CACHE moves it.
`tinyllava data cache` lists it. An entry of Arrow files is described by KEY.json beside them: where it is from, and the
hashes of its files, by which a damaged one is noticed.
"""

import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from tinyllava import atomic
from tinyllava.atomic import FULL
from tinyllava.errors import UserError

END = 1 << 16  # bytes of each end of a file that are hashed: those of a Parquet file hold sizes and statistics
if TYPE_CHECKING:
    import pyarrow

READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
UNWRITABLE = {*FULL, *READ_ONLY}  # a full disk, a full quota, a read-only file system or folder
logger = logging.getLogger("tinyllava")
Content = TypeVar("Content")
_in_use: dict[Path, int] = {}  # {entry: a file descriptor that holds its lock while this process and its workers live}


def find_cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder of the cache: `cache_dir` if given, else $TINYLLAVA_CACHE, else ~/.cache/tinyllava."""
    return Path(cache_dir or os.environ.get("TINYLLAVA_CACHE") or Path.home() / ".cache" / "tinyllava")


def digest(*parts: object) -> str:
    """A short hash of `parts`: 16 hex digits, the same in every process and on every machine."""
    hasher = hashlib.sha256()
    for part in parts:
        # Texts from the web can hold lone surrogates, which plain UTF-8 refuses to encode.
        hasher.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass"))
        hasher.update(b"\0")
    return hasher.hexdigest()[:16]


def hash_columns(table: "pyarrow.Table", names: Sequence[str]) -> str:
    """A hash of columns of numbers, texts, or lists of these. It does not depend on the chunks of the table.

    For a list only its values are hashed, so its length must be another column.
    """
    hashes = []
    for name in names:
        hasher = hashlib.blake2b()  # chunk by chunk: a column can have gigabytes
        for chunk in table.column(name).chunks:
            values = (chunk.flatten() if hasattr(chunk, "flatten") else chunk).to_numpy(zero_copy_only=False)
            if values.dtype == object:
                values = "\0".join([*map(repr, values), ""]).encode("utf-8", "surrogatepass")
            hasher.update(values)
        hashes.append(hasher.digest())
    return digest(*hashes)


def list_files(path: str) -> list[Path]:
    """The local files at `path`: a file, a folder or a pattern."""
    local = Path(path)
    found = [local, *local.rglob("*")] if local.exists() else map(Path, glob.glob(path, recursive=True))
    return sorted(file for file in found if file.is_file())


def hash_files(path: str) -> str:
    """A hash of the names, sizes and both ends of the local files at `path`: a file, a folder or a pattern.

    Streams are too long to read. The hash does not depend on the folder. It is empty if there are no local files.
    """
    parts: list[object] = []
    for file in list_files(path):
        size = file.stat().st_size
        with file.open("rb") as stream:
            parts += [file.name, size, stream.read(END)]
            stream.seek(max(0, size - END))
            parts.append(stream.read())
    return digest(*parts) if parts else ""


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of `path`: one process prepares it while the others (ranks, other runs) wait, and then read it.

    In a cache that is read-only there is no lock, and what is there can be read. Raises UserError if something must be
    written and cannot be.
    """
    file_lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file_lock.acquire()
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise _explain_unwritable(path.parent, error) from None
    try:
        yield
    except (OSError, UserError) as error:
        cause = error.__context__ if isinstance(error, UserError) else error  # `atomic` explains errors for any file
        is_here = isinstance(cause, OSError) and str(path.parent) in str(cause.filename or path)
        if not is_here or cause.errno not in UNWRITABLE:
            raise
        raise _explain_unwritable(path.parent, cause) from None
    finally:
        file_lock.release()


def _explain_unwritable(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"cannot write to the cache {folder}: {reason}. Set TINYLLAVA_CACHE to another folder.")


def open_entry(
    target: Path, source: str, make: Callable[[], Sequence[Path]], read: Callable[[list[Path]], Content]
) -> Content:
    """What `read` returns for the files of an entry. `target`, with the suffix .json, describes it.

    If the entry is missing or damaged, one process makes it with `make`, which returns the files that it wrote beside
    `target`. source: what it is made of, for people. Raises UserError if it must be written and cannot be.
    """
    content = _read_entry(target, read)
    if content is not None:
        return content
    with lock(target):
        content = _read_entry(target, read)  # another process may have made it while this one waited
        if content is not None:
            return content
        if drop_entry(target):
            logger.warning("the cache entry %s is damaged, or of an earlier version: it is made again", target)
        files = {os.path.relpath(file, target.parent): hash_files(str(file)) for file in make()}
        described = {"source": source, "made": time.strftime("%Y-%m-%d %H:%M"), "files": files}
        atomic.write_text(target.with_suffix(".json"), json.dumps(described, indent=1) + "\n")
        mark_used(target.with_suffix(".json"))
        return read([target.parent / name for name in files])


def drop_entry(target: Path) -> list[Path]:
    """Remove the description of an entry and its files, except for the lock. Returns them."""
    left = [file for file in target.parent.glob(f"{glob.escape(target.stem)}[._]*") if file.suffix != ".lock"]
    for file in left:
        atomic.remove(file)
    return left


def read_description(path: Path) -> dict[str, Any]:
    """{"source", "made", "files": {name: hash}} of the entry that `path` describes; {} if it is damaged."""
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
        described = json.loads(path.read_text(encoding="utf-8"))
        if all(hash_files(str(path.parent / name)) == known != "" for name, known in described["files"].items()):
            return described
    return {}


def _read_entry(target: Path, read: Callable[[list[Path]], Content]) -> Content | None:
    """What `read` returns, or None for an entry that is missing or damaged."""
    path = target.with_suffix(".json")
    if described := read_description(path):
        mark_used(path)  # before it is read, so that nobody prunes it in between
        with suppress(OSError, ValueError, KeyError, EOFError):  # pyarrow's errors are of these kinds
            return read([target.parent / name for name in described["files"]])
    return None


def mark_used(path: Path) -> None:
    """Note that this process uses an entry: its time of last use is now, and it is not pruned while the process lives.

    path: the description of the entry, or its folder.
    """
    with suppress(OSError):  # in a cache that is read-only
        os.utime(path)
    if path not in _in_use:
        with suppress(OSError):  # not every network file system has locks
            _in_use[path] = os.open(path, os.O_RDONLY)
            fcntl.flock(_in_use[path], fcntl.LOCK_SH | fcntl.LOCK_NB)


def is_in_use(path: Path) -> bool:
    """Whether a process on this machine uses the entry."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
