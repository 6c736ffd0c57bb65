"""Files and directories are complete when they appear. After an error or with a full disk, the old content stays."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.tiny_vlm import build_moved_vlm
from tinyllava import atomic, checkpoint
from tinyllava.checkpoint import weight_files
from tinyllava.errors import UserError


def list_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fail_with(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_text_is_written_with_its_folders_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    for text in ("ä\n", "new"):
        atomic.write_text(path, text)
        assert path.read_bytes() == text.encode("utf-8")
        assert list_names(path.parent) == ["c.txt"]


def test_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        atomic.write_text(path, "new and \ud800")  # a lone surrogate has no UTF-8
    assert path.read_text() == "old" and list_names(tmp_path) == ["c.txt"]


def test_a_file_gets_its_name_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "c.bin"
    path.write_bytes(b"old")
    with atomic.write_file(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old" and partial.parent == path.parent and partial.name.startswith(".")
    assert path.read_bytes() == b"new" and list_names(tmp_path) == ["c.bin"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_an_error_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "c.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic.write_file(path) as partial:
        partial.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old" and list_names(tmp_path) == ["c.bin"]


def test_an_error_leaves_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError), atomic.write_file(tmp_path / "c.bin") as partial:
        partial.write_bytes(b"half")
        raise ValueError("no")
    assert list_names(tmp_path) == []


def test_a_directory_replaces_the_old_one_and_starts_empty(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "c"
    atomic.partial_path(directory).mkdir(parents=True)
    (atomic.partial_path(directory) / "left").touch()  # by a process that was killed
    for name in ("a", "b"):
        with atomic.write_directory(directory) as partial:
            assert list_names(partial) == []
            (partial / name).touch()
            assert list_names(directory) == ["a"] if name == "b" else not directory.exists()
        assert list_names(directory) == [name] and list_names(directory.parent) == ["c"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_an_error_leaves_the_old_directory(error: BaseException, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    directory.mkdir()
    (directory / "old").touch()
    with pytest.raises(type(error)), atomic.write_directory(directory) as partial:
        (partial / "half").touch()
        raise error
    assert list_names(directory) == ["old"] and list_names(tmp_path) == ["c"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
def test_a_full_disk_is_named_with_its_directory_and_what_to_do(number: int, tmp_path: Path) -> None:
    says = rf"^the disk is full: {tmp_path / 'c'} was not written \(\d+ MiB free\)\..* Free some space and run"
    with pytest.raises(UserError, match=says) as error, atomic.write_directory(tmp_path / "c"):
        fail_with(number)
    assert len(str(error.value).splitlines()) == 1 and list_names(tmp_path) == []


def test_another_error_of_the_system_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic.write_directory(tmp_path / "c"):
        fail_with(errno.EACCES)


def test_the_error_of_another_library_is_recognised_as_a_full_disk(tmp_path: Path) -> None:
    """/dev/full is a disk that is always full: the errors are the real ones."""
    with (
        pytest.raises(UserError, match=r"the disk is full: .*/c was not"),
        atomic.write_directory(tmp_path / "c") as path,
    ):
        (path / "tokenizer.json").symlink_to("/dev/full")
        Tokenizer(WordLevel({"a": 0}, "a")).save(str(path / "tokenizer.json"))
    with pytest.raises(UserError, match="the disk is full: /dev/full was not written"):
        atomic.append_text(Path("/dev/full"), "a line")


def test_an_error_that_only_a_full_disk_explains_is_probed(tmp_path: Path) -> None:
    """torch's writer raises a RuntimeError that does not say why."""
    with pytest.raises(RuntimeError, match="unexpected pos"), atomic.write_directory(tmp_path / "c"):
        raise RuntimeError("unexpected pos 64 vs 0")  # the disk has space: it is another error
    assert atomic.has_space(tmp_path) and list_names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="only root can mount a small disk")
def test_a_small_disk_fills_up_while_weights_are_written(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("this container cannot mount")
    try:
        atomic.write_text(tmp_path / "run.json", "old")
        weight = torch.zeros(1 << 20)
        for write in (lambda path: torch.save(weight, path), lambda path: save_file({"weight": weight}, path)):
            with (
                pytest.raises(UserError, match=r"the disk is full: .*/c was"),
                atomic.write_directory(tmp_path / "c") as path,
            ):
                write(path / "weights")
        with pytest.raises(UserError, match=r"^the disk is full: .*run\.json was not written"):
            atomic.write_text(tmp_path / "run.json", "new" * (1 << 20))
        assert (tmp_path / "run.json").read_text() == "old" and list_names(tmp_path) == ["run.json"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_place_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "folder", tmp_path / "file" / "a", Path("/proc/a"), tmp_path / ("a" * 300)):
        with pytest.raises(UserError, match=r"^cannot write .*: \w.*\. Choose another place\.$"):
            atomic.write_text(place, "text")
        if place.name != "folder":
            with pytest.raises(UserError, match="cannot write "), atomic.write_directory(place):
                pytest.fail("it was written")
    with pytest.raises(UserError, match="cannot write "):
        atomic.append_text(tmp_path / "folder", "text")


KILLED = """
import os, signal, sys
from pathlib import Path
from tinyllava import atomic
rename, left = Path.rename, int(sys.argv[2])
def counted(path, target):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return rename(path, target)
Path.rename = counted
with atomic.write_directory(Path(sys.argv[1])) as partial:
    (partial / "new").touch()
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_while_a_directory_is_exchanged_loses_nothing(renames: int, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    directory.mkdir()
    (directory / "old").touch()
    done = subprocess.run([sys.executable, "-c", KILLED, directory, str(renames)])
    assert done.returncode == -9 and directory.exists() == (renames == 0)
    atomic.recover(directory)
    assert list_names(directory) == ["old"]
    with atomic.write_directory(directory) as partial:
        (partial / "new").touch()
    assert list_names(directory) == ["new"] and list_names(tmp_path) == ["c"]


def test_what_was_replaced_is_deleted_when_the_new_content_has_the_name(tmp_path: Path) -> None:
    for name in ("c", ".c.replaced"):  # a kill between the last rename and the deletion
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    atomic.recover(tmp_path / "c")
    assert list_names(tmp_path) == ["c"] and list_names(tmp_path / "c") == ["c"]
    (tmp_path / "link").symlink_to(tmp_path / "c")  # of the user: what it leads to stays
    with atomic.write_directory(tmp_path / "link") as partial:
        (partial / "new").touch()
    assert list_names(tmp_path) == ["c", "link"] and list_names(tmp_path / "c") == ["c"]


def test_a_full_disk_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = build_moved_vlm()
    with atomic.write_directory(tmp_path / "c") as directory:
        checkpoint.save(vlm, directory)
    monkeypatch.setattr(weight_files, "save_file", lambda *args, **kwargs: fail_with(errno.ENOSPC))
    with pytest.raises(UserError, match="disk is full"), atomic.write_directory(tmp_path / "c") as directory:
        checkpoint.save(vlm, directory)
    assert list_names(tmp_path) == ["c"]
    checkpoint.load(tmp_path / "c")
