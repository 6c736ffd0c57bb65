"""Where prepared data lies between runs: converted annotations, tokenised samples, the embedded default dataset.

Everything in it can be made again, so `rm -r ~/.cache/tinyllava` is always safe. TINYLLAVA_CACHE moves it.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from tinyllava.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir` if given, else $TINYLLAVA_CACHE, else ~/.cache/tinyllava."""
    return Path(cache_dir or os.environ.get("TINYLLAVA_CACHE") or Path.home() / ".cache" / "tinyllava")


def digest(*parts: object) -> str:
    """A short hash of `parts`: 16 hex digits, the same in every process and on every machine."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass"))
        hasher.update(b"\0")
    return hasher.hexdigest()[:16]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process prepares `path` while the others (the ranks of one machine, two runs) wait and then read it.

    Raises UserError if the cache cannot be written.
    """
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _unwritable(path.parent, error) from None
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _unwritable(path.parent, error) from None
    finally:
        lock.release()


def _unwritable(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"cannot write to the cache {folder}: {reason}. Set TINYLLAVA_CACHE to another folder.")
