"""Refuse a second run in a directory that another process trains in.

The lock is flock on `OUTPUT/.lock`. The system releases it when its process ends, however it ends. Linux maps flock on
NFS to a lock of the server, so it also holds between machines (mount options `nolock` and `local_lock=flock` turn that
off). A process that was forked from the owner, such as a data worker, gives up its copy of the lock at once. Otherwise
it would hold the lock after the owner was killed.
"""

import errno
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from tinyllava.console import is_main_process
from tinyllava.errors import UserError
from tinyllava.runs import LOCK, clear_leftovers, discard_replaced, read_json_or_empty

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("tinyllava")
BUSY = {errno.EAGAIN, errno.EACCES}  # another process has the lock
UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL}  # a file system without locks
_held: dict[Path, tuple[int, int | None]] = {}  # {lock file: (thread, descriptor)} of this process


@contextmanager
def lock_run(directory: Path) -> Iterator[None]:
    """Hold the lock of a run in this block, and first clear what a killed process left unfinished in its directory.

    Only the main process takes it: the others belong to the same run. A block inside another one of the same thread
    holds it already. Raises UserError if another process holds it, or if the directory cannot be written.
    """
    path = directory.absolute() / LOCK
    if not is_main_process() or _held.get(path, (0,))[0] == threading.get_ident():
        yield
        return
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, directory)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}. Choose another --output.") from None
    _held[path] = (threading.get_ident(), descriptor)
    try:
        clear_leftovers(directory)
        yield
        discard_replaced(directory)  # the run is finished
    finally:
        with suppress(OSError):
            path.unlink()  # while it is locked: who has opened it notices
            if is_new:
                directory.rmdir()  # it is empty if the run wrote nothing
        del _held[path]
        os.close(descriptor)


def _acquire(path: Path, directory: Path) -> int:
    """Open and lock the file. Returns its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no flock")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in BUSY:
                os.close(descriptor)
                raise UserError(_describe_owner(path, directory)) from None
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
            logger.warning("%s has no file locks: do not start a second run in it, it cannot be refused.", directory)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # the owner before removed the file after it was opened here
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(owner) + "\n").encode(), 0)
    return descriptor


def _describe_owner(path: Path, directory: Path) -> str:
    owner = read_json_or_empty(path)
    host, pid, started = (str(owner.get(key, "unknown"))[:100] for key in ("host", "pid", "started"))
    return (
        f"another process trains in {directory}: process {pid} on {host}, since {started}. Wait until it ends, stop it,"
        " or choose another --output."
    )


def _release_in_child() -> None:
    """Close the copies of the locks in a forked process. This does not unlock them for the owner."""
    for _, descriptor in _held.values():
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
