"""Files and directories are complete when they appear. After an error or with a full disk, the old content stays."""

import errno
import os
from pathlib import Path

import pytest

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


def test_a_full_disk_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = build_moved_vlm()
    with atomic.write_directory(tmp_path / "c") as directory:
        checkpoint.save(vlm, directory)
    monkeypatch.setattr(weight_files, "save_file", lambda *args, **kwargs: fail_with(errno.ENOSPC))
    with pytest.raises(UserError, match="disk is full"), atomic.write_directory(tmp_path / "c") as directory:
        checkpoint.save(vlm, directory)
    assert list_names(tmp_path) == ["c"]
    checkpoint.load(tmp_path / "c")
