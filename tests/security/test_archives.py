"""A zip that `data prepare` unpacks writes nothing outside of its folder, no link, and no more than it may."""

import stat
import struct
import zipfile
from pathlib import Path

import pytest

from tinyllava.data.prepare import fetch
from tinyllava.data.prepare.fetch import DownloadError, unpack_zip

NAMES = {
    "parent": "../evil.txt",
    "deep": "a/../../../evil.txt",
    "absolute": "/tmp/evil.txt",
    "drive": "C:/evil.txt",
    "backslash": "..\\evil.txt",
    "control": "a\x1b[31m.txt",
    "long": "x" * 300,
    "inner": "a/../b.txt",
}


def write_zip(path: Path, entries: dict[str, bytes], mode: int = stat.S_IFREG | 0o644, **how) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **how) as file:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name)
            entry.filename, entry.orig_filename = name, name
            entry.external_attr, entry.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            file.writestr(entry, content)
    return path


def check_refused(archive: Path, folder: Path, match: str) -> str:
    before = sorted(path for path in folder.parent.rglob("*"))
    with pytest.raises(DownloadError, match=match) as error:
        unpack_zip(archive, folder)
    new = [path for path in folder.parent.rglob("*") if path not in before]
    assert all(".images.partial" in path.parts for path in new)
    assert not any(path.is_symlink() or path.is_file() for path in new)
    assert not str(error.value).count("\x1b") and len(str(error.value)) < 400 + len(str(archive))
    return str(error.value)


@pytest.mark.parametrize("kind", NAMES)
def test_names_that_leave_the_folder_are_refused(tmp_path, kind):
    archive = write_zip(tmp_path / "a.zip", {"fine.txt": b"1", NAMES[kind]: b"2"})
    check_refused(archive, tmp_path / "images", "is not unpacked: its entry .* (outside of the folder|too long)")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_are_refused(tmp_path, kind):
    archive = write_zip(tmp_path / "a.zip", {"images/x": b"/etc/passwd"}, mode=kind | 0o777)
    check_refused(archive, tmp_path / "images", "is a link or a device")


def test_a_ratio_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "SMALL", 1_000_000)
    archive = write_zip(tmp_path / "a.zip", {"zeros": bytes(3_000_000)})
    check_refused(archive, tmp_path / "images", "times its own size")


def test_a_zip_that_announces_petabytes_is_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"a": b"x" * 100})
    content = archive.read_bytes()
    at = content.index(b"PK\x01\x02")
    archive.write_bytes(content[: at + 24] + struct.pack("<I", 0xFFFFFFF0) + content[at + 28 :])
    check_refused(archive, tmp_path / "images", "times its own size")


def test_too_many_entries_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MEMBERS", 10)
    check_refused(
        write_zip(tmp_path / "a.zip", {str(n): b"" for n in range(11)}), tmp_path / "images", "at most 10 files"
    )


def test_an_encrypted_zip_is_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"a.txt": b"x" * 50})
    content = bytearray(archive.read_bytes())
    content[6] |= 1  # the flag in the entry's own header, and in the directory's
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    check_refused(archive, tmp_path / "images", "is encrypted")


def test_a_file_that_is_also_a_folder_is_refused(tmp_path):
    for number, entries in enumerate(({"a": b"1", "a/b": b"2"}, {"a/b": b"2", "a": b"1"})):
        archive = write_zip(tmp_path / f"{number}.zip", entries)
        check_refused(archive, tmp_path / "images", "a is a file and a folder in it")


@pytest.mark.parametrize("method", [6, 99, zipfile.ZIP_LZMA])
def test_an_unknown_or_wrong_compression_is_damage(tmp_path, method):
    archive = write_zip(tmp_path / "a.zip", {"a.txt": b"x" * 50})
    content = bytearray(archive.read_bytes())
    content[8:10] = struct.pack("<H", method)
    at = content.index(b"PK\x01\x02") + 10
    content[at : at + 2] = struct.pack("<H", method)
    archive.write_bytes(content)
    with pytest.raises(DownloadError, match="damaged"):
        unpack_zip(archive, tmp_path / "images")


def test_what_lies_in_the_way_is_named(tmp_path):
    (tmp_path / "images" / "a.txt").mkdir(parents=True)
    (tmp_path / "images" / "a.txt" / "mine").touch()
    with pytest.raises(DownloadError, match=r"cannot move the content .*a\.txt"):
        unpack_zip(write_zip(tmp_path / "a.zip", {"a.txt": b"1", "b.txt": b"2"}), tmp_path / "images")
    assert (tmp_path / "images" / "a.txt" / "mine").is_file()


def test_an_ordinary_zip_is_unpacked(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"images/кот.jpg": b"1", "images/a b/1.jpg": b"2"})
    unpack_zip(archive, tmp_path / "images")
    assert (tmp_path / "images/кот.jpg").read_bytes() == b"1" and (tmp_path / "images/a b/1.jpg").read_bytes() == b"2"
