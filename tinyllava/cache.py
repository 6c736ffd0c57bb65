"""The cache of prepared data: converted annotations, tokenised samples, the embedded default dataset.

Everything in it can be made again, so `rm -r ~/.cache/tinyllava` is always safe. TINYLLAVA_CACHE moves it.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from tinyllava.atomic import FULL
from tinyllava.errors import UserError

UNWRITABLE = {*FULL, errno.EROFS}  # a full disk, a full quota, a read-only file system


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


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of `path`: one process prepares it while the others (ranks, other runs) wait, and then read it.

    Raises UserError if the cache cannot be written.
    """
    file_lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file_lock.acquire()
    except OSError as error:
        raise _explain_unwritable(path.parent, error) from None
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise _explain_unwritable(path.parent, error) from None
    finally:
        file_lock.release()


def _explain_unwritable(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"cannot write to the cache {folder}: {reason}. Set TINYLLAVA_CACHE to another folder.")
