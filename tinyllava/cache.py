"""The cache of prepared data: converted annotations, tokenised samples, the embedded default dataset.

Everything in it can be made again, so `rm -r ~/.cache/tinyllava` is always safe. TINYLLAVA_CACHE moves it.
"""

import errno
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from tinyllava.atomic import FULL
from tinyllava.errors import UserError

END = 1 << 16  # bytes of each end of a file that are hashed: those of a Parquet file hold sizes and statistics
if TYPE_CHECKING:
    import pyarrow

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


def hash_files(path: str) -> str:
    """A hash of the names, sizes and both ends of the local files at `path`: a file, a folder or a pattern.

    Streams are too long to read. The hash does not depend on the folder. It is empty if there are no local files.
    """
    local = Path(path)
    found = [local, *local.rglob("*")] if local.exists() else map(Path, glob.glob(path, recursive=True))
    parts: list[object] = []
    for file in sorted(file for file in found if file.is_file()):
        size = file.stat().st_size
        with file.open("rb") as stream:
            parts += [file.name, size, stream.read(END)]
            stream.seek(max(0, size - END))
            parts.append(stream.read())
    return digest(*parts) if parts else ""


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
