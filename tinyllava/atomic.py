"""Write files and directories whole: they get their name only when all of their content is written.

Everything is written beside its final place and then renamed. A file therefore always holds its old content or its new
content, even after a kill or a full disk. A directory that a kill stops while it is being replaced can be missing, but
it is never half written.
"""

import errno
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyllava.errors import UserError

logger = logging.getLogger("tinyllava")
FULL = {errno.ENOSPC, errno.EDQUOT}  # errors of a full disk and of a full quota


def partial_path(path: Path) -> Path:
    """The hidden path beside `path` to which it is written first. A rename requires the same file system."""
    return path.with_name(f".{path.name}.partial")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, and create the folders above it."""
    with write_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def set_aside(path: Path) -> None:
    """Rename what is at `path`, if anything, to the first free `NAME.kept-N`: its name is needed for a file of ours."""
    if not os.path.lexists(path):
        return
    names = (path.with_name(f"{path.name}.kept-{number}") for number in itertools.count(1))
    kept = next(name for name in names if not os.path.lexists(name))
    path.rename(kept)
    logger.warning("%s was not written by this run, and is now %s", path, kept.name)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Yield a path to write the file to; it becomes `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        partial.replace(path)
    finally:
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

    Raises UserError when the disk is full. The old content of `directory` is then unchanged.
    """
    partial = partial_path(directory)
    # A process that was killed may have left one.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        apply_umask(partial)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(directory.parent).free // 2**20
        raise UserError(
            f"the disk is full: {directory} was not written ({free} MiB free). Everything written before is intact."
            " Free some space and run the same command again."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def link_file(source: Path, target: Path) -> None:
    """Make a hard link, or a copy if the file system has no links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in FULL:
            raise
        shutil.copy2(source, target)
