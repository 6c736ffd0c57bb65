"""Write files and directories whole: they get their name only when all of their content is written.

Everything is written beside its final place, flushed to the disk, and then renamed. A file or a directory therefore
holds its old content or its new content, also after a kill, a full disk or a loss of power. A kill in the middle of the
exchange of a directory leaves its old content beside it: `recover` gives it its name back.
"""

import errno
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from tinyllava.errors import UserError
from tinyllava.files import raise_value_errors

logger = logging.getLogger("tinyllava")
FULL = {errno.ENOSPC, errno.EDQUOT}  # errors of a full disk and of a full quota
# safetensors and tokenizers raise errors of their own, with the text of the system's error. torch raises a RuntimeError
# without it: its writer only notices that less was written than it wanted.
FULL_TEXTS = (*(f"(os error {number})" for number in FULL), *map(os.strerror, FULL))
PROBE = 1 << 20  # bytes that a disk which is not full takes
FLUSH_THREADS = 16


def partial_path(path: Path) -> Path:
    """The hidden path beside `path` to which it is written first. A rename requires the same file system."""
    return path.with_name(f".{path.name}.partial")


def replaced_path(path: Path) -> Path:
    """The hidden path beside the directory `path` at which its old content is while the new one gets its name."""
    return path.with_name(f".{path.name}.replaced")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, and create the folders above it."""
    with write_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    """Append to a file. Raises UserError if the disk is full or the file cannot be written."""
    with explain_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def set_aside(path: Path) -> None:
    """Rename what is at `path`, if anything, to the first free `NAME.kept-N`: its name is needed for a file of ours."""
    if not os.path.lexists(path):
        return
    names = (path.with_name(f"{path.name}.kept-{number}") for number in itertools.count(1))
    kept = next(name for name in names if not os.path.lexists(name))
    path.rename(kept)
    logger.warning("%s was not written by this run, and is now %s", path, kept.name)


def move_up(directory: Path) -> None:
    """Move what is in a directory into the one above it, and remove the directory."""
    for path in list(directory.iterdir()):
        path.rename(directory.parent / path.name)
    directory.rmdir()


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Yield a path to write the file to; it becomes `path` when the block ends without an error.

    Raises UserError if the disk is full or the file cannot be written. The old content of `path` is then unchanged.
    """
    partial = partial_path(path)
    with explain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            flush(partial)
            partial.replace(path)
            flush(path.parent)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def apply_umask(directory: Path) -> None:
    """Give the files in `directory` the mode that the umask allows: safetensors writes its files for their owner only.

    Links to files of other directories keep their mode.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.rglob("*.safetensors"):
        if path.stat().st_nlink == 1:
            path.chmod(0o666 & ~umask)


@contextmanager
def write_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory; it replaces `directory` when the block ends without an error.

    Raises UserError if the disk is full or the directory cannot be written. Its old content is then unchanged.
    """
    partial = partial_path(directory)
    with explain_errors(directory):
        recover(directory)
        # A process that was killed may have left one.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            apply_umask(partial)
            flush_tree(partial)
            exchange(partial, directory)
        finally:
            recover(directory)
            shutil.rmtree(partial, ignore_errors=True)


def exchange(new: Path, directory: Path) -> None:
    """Rename `new` to `directory`, whose old content is deleted only when the new one has its name."""
    replaced = replaced_path(directory)
    if os.path.lexists(directory):
        directory.rename(replaced)
    new.rename(directory)
    flush(directory.parent)
    with suppress(OSError):
        remove(replaced)


def recover(directory: Path) -> None:
    """Finish an exchange of `directory` that a kill stopped: its old content gets its name back, or is deleted."""
    replaced = replaced_path(directory)
    if not os.path.lexists(replaced):
        return
    if os.path.lexists(directory):
        remove(replaced)
    else:
        replaced.rename(directory)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a directory, are on the disk (fsync).

    Without it, a loss of power after the rename can leave a file that has its name but no content.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot flush directories
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EBADF}:
            raise
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    """Flush all files and directories in `directory`. Links to files of other directories are on the disk already.

    The threads share the journal's commits: 14 files took 20 ms, and 97 ms one after the other (ext4).
    """
    paths = [path for path in directory.rglob("*") if not path.is_symlink()]
    paths = [path for path in paths if path.is_dir() or (path.is_file() and path.stat().st_nlink == 1)]
    with ThreadPoolExecutor(FLUSH_THREADS) as threads:
        list(threads.map(flush, paths))
    flush(directory)


def link_file(source: Path, target: Path) -> None:
    """Make a hard link, or a copy if the file system has no links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in FULL:
            raise
        shutil.copy2(source, target)


# -- errors ------------------------------------------------------------------------------------------------------------


@contextmanager
def explain_errors(path: Path) -> Iterator[None]:
    """Raise UserError for a full disk, and for a path that cannot be written, while `path` is written."""
    try:
        with raise_value_errors():  # tokenizers
            yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if is_disk_full(error, path.parent):
            raise UserError(describe_full_disk(path)) from None
        # An error of the system without a file name is not of a path.
        if not isinstance(error, OSError) or error.filename is None:
            raise
        raise UserError(f"cannot write {path}: {error.strerror} ({error.filename}). Choose another place.") from None


def is_disk_full(error: Exception, folder: Path) -> bool:
    """Whether an error comes from a full disk or quota. The libraries that write weights have their own errors."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    if any(text in str(error) for text in FULL_TEXTS):
        return True
    return isinstance(error, RuntimeError) and not has_space(folder)


def has_space(folder: Path) -> bool:
    """Whether PROBE bytes can be written to `folder`. The free space that the system reports leaves out quotas."""
    probe = folder / f".space-{os.getpid()}"
    try:
        probe.write_bytes(bytes(PROBE))
        flush(probe)
    except OSError as error:
        return error.errno not in FULL
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return True


def describe_full_disk(path: Path) -> str:
    """The message for a full disk, with the free space on the disk of `path`."""
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    free = shutil.disk_usage(folder).free // 2**20
    return (
        f"the disk is full: {path} was not written ({free} MiB free). Everything written before is intact. Free some"
        " space and run the same command again."
    )
