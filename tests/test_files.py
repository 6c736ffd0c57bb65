"""JSON is read in one way, and damaged files of a checkpoint are no tracebacks."""

import io
import struct
import zipfile
from pathlib import Path

import pytest

from tinyllava.checkpoint import RECORD, read_record
from tinyllava.errors import UserError
from tinyllava.files import FAULTS, check_model_files, parse_json
from tinyllava.resume import is_whole_zip
from tinyllava.runs import list_checkpoints


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 5000, "nested too deeply"),
        (b'{"a":' * 5000, "nested too deeply"),
        ("9" * 5000, "too many digits"),
        (b'"\xed\xa0\x80"', "invalid continuation byte"),
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
    ],
)
def test_whatever_json_cannot_read_is_a_value_error(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_half_an_emoji_is_replaced_and_a_whole_one_is_kept() -> None:
    assert parse_json(r'["\ud83d", "\ud83d\ude42", "\uD83D x"]') == ["\ufffd", "\U0001f642", "\ufffd x"]
    assert parse_json("\ufeff[1]".encode()) == [1]


def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "%s"}}' % ("x" * 300))
    with pytest.raises(UserError, match="is incomplete: xxx"):
        check_model_files(tmp_path)


def test_a_record_of_another_form_and_a_stage_that_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for model in ("5", "[]", '"connector"', "null"):
        (tmp_path / RECORD).write_text(f'{{"format": 1, "files": {{}}, "model": {model}}}')
        with pytest.raises(UserError, match="is not the record of a checkpoint"):
            read_record(tmp_path)
    assert list_checkpoints(tmp_path / ("A" * 300)) == []
    assert issubclass(IndexError, FAULTS)  # what an image processor raises for a list in place of a size


def test_a_damaged_zip_is_not_whole(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", "content" * 50)
    whole, path = stream.getvalue(), tmp_path / "optimizer.pt"
    path.write_bytes(whole)
    assert is_whole_zip(path)
    end = whole.rindex(b"PK\x05\x06")
    size_of_directory = (
        whole[: end + 12] + struct.pack("<L", 10_000) + whole[end + 16 :]
    )  # it would start before the file
    for content in (size_of_directory, b"", whole[:-9], whole.replace(b"\x08\x00", b"\x0e\x00")):  # the last: LZMA
        path.write_bytes(content)
        assert not is_whole_zip(path)
