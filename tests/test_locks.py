"""Two runs cannot train in one directory. The lock ends with its process, however that ends."""

import errno
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tinyllava import locks
from tinyllava.errors import UserError
from tinyllava.locks import lock_run
from tinyllava.runs import LOCK

# Holds the lock, and starts a process that outlives it, by a fork and by an exec. Says their ids.
OWNER = """
import os, subprocess, sys, time
from pathlib import Path
from tinyllava.locks import lock_run
with lock_run(Path(sys.argv[1])):
    child = os.fork() or os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)"])
    worker = os.fork()
    if not worker:
        time.sleep(600)
    print(os.getpid(), child, worker, flush=True)
    time.sleep(600)
"""


def is_free(directory: Path) -> bool:
    try:
        with lock_run(directory):
            return True
    except UserError:
        return False


def try_in_thread(directory: Path) -> bool:
    """Whether another thread of this process gets the lock."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(is_free(directory)))
    thread.start()
    thread.join()
    return answers[0]


def test_a_second_run_is_refused_and_a_kill_frees_the_lock_while_workers_live(tmp_path: Path) -> None:
    run = tmp_path / "run"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, run], stdout=subprocess.PIPE, text=True)
    others: list[int] = []
    try:
        pid, *others = map(int, owner.stdout.readline().split())
        with pytest.raises(UserError) as error, lock_run(run):
            pytest.fail("two runs in one directory")
        text = str(error.value)
        assert f"process {pid} on {socket.gethostname()}, since 20" in text and "--output" in text
        assert (run / LOCK).is_file()
        owner.kill()
        owner.wait()
        for other in others:
            os.kill(other, 0)  # alive
        with lock_run(run):
            assert not try_in_thread(run)
    finally:
        owner.kill()
        owner.wait()
        for other in others:
            os.kill(other, signal.SIGKILL)
        owner.stdout.close()


def test_a_lock_is_held_by_blocks_inside_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "new"
    with lock_run(run):
        with lock_run(run):
            pass
        assert not try_in_thread(run)
    assert not run.exists()  # nothing was written
    run.mkdir()
    with lock_run(run):
        (run / "run.json").write_text("{}")
    assert os.listdir(run) == ["run.json"] and is_free(run)


def test_a_process_that_was_forked_does_not_unlock_it(tmp_path: Path) -> None:
    with lock_run(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=print)
        child.start()
        child.join()
        assert child.exitcode == 0 and not try_in_thread(tmp_path)


def test_a_file_that_its_owner_removed_is_not_locked(tmp_path: Path) -> None:
    """A process opens the file, its owner ends and removes it, and a third one creates it again."""
    opened, flock = [], locks.fcntl.flock

    def end_first(descriptor: int, how: int) -> None:
        if not opened:
            opened.append(descriptor)
            (tmp_path / LOCK).unlink()
        flock(descriptor, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks.fcntl, "flock", end_first)
        with lock_run(tmp_path):
            assert (tmp_path / LOCK).is_file() and not try_in_thread(tmp_path)


def test_only_the_main_process_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock_run(tmp_path):
        monkeypatch.setenv("RANK", "1")
        assert try_in_thread(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS], ids=["nfs", "fuse"])
def test_a_file_system_without_locks_is_named_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, "tinyllava"), lock_run(tmp_path):
        pass
    (line,) = caplog.records
    assert "has no file locks" in line.message and str(tmp_path) in line.message


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "lock" / LOCK).mkdir(parents=True)
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run"), tmp_path / "lock"):
        with pytest.raises(UserError, match=r"cannot write to .*\. Choose another --output") as error, lock_run(place):
            pytest.fail("it was locked")
        assert str(place) in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": {}}', "\0" * 64])
def test_a_damaged_lock_file_still_refuses(content: str, tmp_path: Path) -> None:
    with lock_run(tmp_path):
        (tmp_path / LOCK).write_text(content)
        assert not try_in_thread(tmp_path)
