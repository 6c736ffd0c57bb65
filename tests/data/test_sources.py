import errno
import json
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from tinyllava import atomic, json_records
from tinyllava.config import DataSpec
from tinyllava.data.images import open_image
from tinyllava.data.sample import SampleError
from tinyllava.data.sources import _json, open_source
from tinyllava.errors import UserError
from tinyllava.stamps import prepare_tier


def open_path(path: str, **options):
    return open_source(DataSpec(path=path, **options))


def list_turns(sample) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in sample.messages]


ROUND = ("<image>\nwhat is it?", "a red cat")
MESSAGES = [{"role": "user", "content": "<image>\nwhat is it?"}, {"role": "assistant", "content": "a red cat"}]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a red cat"}]},
]
TURNS = [("user", ROUND[0]), ("assistant", ROUND[1])]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "no_suffix"])
def test_records_of_one_file_need_not_agree(write, llava, folder, name):
    records = [
        llava("a", "red.jpg", ROUND),
        {**llava(7, ["red.jpg", "blue.jpg"], ("<image><image> both?", "yes")), "extra": {"nested": [1, "two"]}},
        {
            "conversations": [
                {"from": "system", "value": "be brief"},
                *llava("", None, ("hi", "hello"))["conversations"],
            ]
        },
        {**llava("d", None, ("no picture", "none")), "image": ""},
    ]
    source = open_path(write(records, name), images=str(folder))
    samples = list(source.iterate_samples())
    assert [sample.id for sample in samples] == ["a", "7", "#2", "d"]
    assert [sample.images for sample in samples] == [["red.jpg"], ["red.jpg", "blue.jpg"], [], []]
    assert list_turns(samples[0]) == TURNS
    assert samples[2].messages[0].role == "system"
    assert list_turns(source.to_sample(source.get_record(1))) == list_turns(samples[1])


def test_content_decides_the_format_and_format_overrides(write, llava):
    mixed = [{"id": "1", **llava("1", None, ("a", "b")), "messages": [{"role": "user", "content": "c"}]}]
    path = write(mixed)
    assert list_turns(next(open_path(path).iterate_samples()))[0] == ("user", "a")
    assert list_turns(next(open_path(path, format="messages").iterate_samples()))[0] == ("user", "c")
    late = write([{"id": "odd"}, llava("1", None, ("a", "b"))], "late.json")  # a bad first record does not decide
    source = open_path(late)
    assert list_turns(source.to_sample(source.get_record(1)))[0] == ("user", "a")
    assert [sample.id for sample in source.iterate_samples()] == ["1"]
    with pytest.raises(SampleError, match="'conversations' is not a list"):
        source.to_sample(source.get_record(0))


def test_a_format_of_your_own(write, tmp_path, monkeypatch):
    (tmp_path / "my_formats").mkdir()
    (tmp_path / "my_formats" / "qa.py").write_text(
        "from tinyllava.data.sources import messages, unpack\n"
        "from tinyllava.data.sample import Message, Sample\n"
        "def read(spec, cache_dir):\n"
        "    source = messages.read(spec, cache_dir)\n"
        "    source.to_sample = to_sample\n"
        "    return source\n"
        "def to_sample(record):\n"
        "    record = unpack(record)\n"
        "    return Sample([Message('user', record['q']), Message('assistant', record['a'])], [], record['id'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = open_path(write([{"q": "two and two?", "a": "four"}]), format="my_formats.qa")
    assert list_turns(next(source.iterate_samples())) == [("user", "two and two?"), ("assistant", "four")]
    with pytest.raises(UserError, match=r"unknown data format 'mesages'.*messages"):
        open_path(write([{}]), format="mesages")


@pytest.mark.parametrize("turns", [MESSAGES, PARTS], ids=["text", "parts"])
def test_messages_from_json_lines_parquet_disk_and_streams(write, folder, tmp_path, turns):
    picture = (folder / "red.jpg").read_bytes()
    records = [{"id": str(n), "messages": turns, "images": [str(folder / "red.jpg")]} for n in range(3)]
    table = datasets.Dataset.from_list(records)
    embedded = [{**record, "images": [{"bytes": picture, "path": "red.jpg"}]} for record in records]
    with_pictures = datasets.Dataset.from_list(embedded).cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(tmp_path / "paths.parquet")
    with_pictures.to_parquet(tmp_path / "bytes.parquet")
    with_pictures.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "extra": table.select([1])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "directory").mkdir()
    table.to_parquet(tmp_path / "directory" / "train-0.parquet")

    sources = {
        "lines": open_path(write(records, "data.jsonl")),
        "paths": open_path(str(tmp_path / "paths.parquet")),
        "bytes": open_path(str(tmp_path / "bytes.parquet")),
        "saved": open_path(str(tmp_path / "saved")),
        "splits": open_path(str(tmp_path / "splits"), split="train"),
        "directory": open_path(str(tmp_path / "directory")),
        "glob": open_path(str(tmp_path / "directory" / "*.parquet")),
        "stream": open_path(str(tmp_path / "bytes.parquet"), streaming=True),
        "lines stream": open_path(write(records, "data.jsonl"), streaming=True),
    }
    for name, source in sources.items():
        samples = list(source.iterate_samples())
        assert [sample.id for sample in samples] == ["0", "1", "2"], name
        assert list_turns(samples[1]) == TURNS, name
        (image,) = samples[1].images
        assert image == str(folder / "red.jpg") or image["bytes"] == picture, name
        assert source.streaming == ("stream" in name)
    assert len(open_path(str(tmp_path / "splits"), split="extra")) == 1
    with pytest.raises(UserError, match=r"unknown split 'dev'; it has train, extra"):
        open_path(str(tmp_path / "splits"), split="dev")


def test_tables_with_other_shapes(folder, tmp_path):
    conversations = [{"from": "human", "value": ROUND[0]}, {"from": "gpt", "value": ROUND[1]}]
    one = datasets.Dataset.from_list([{"image": str(folder / "red.jpg"), "conversations": conversations}])
    one.cast_column("image", datasets.Image()).to_parquet(tmp_path / "llava.parquet")
    # what older tables do: a list of dicts kept as a dict of lists
    columns = {"from": ["human", "gpt"], "value": list(ROUND)}
    datasets.Dataset.from_list([{"image": "red.jpg", "conversations": columns}]).to_parquet(tmp_path / "old.parquet")
    for name in ("llava", "old"):
        sample = next(open_path(str(tmp_path / f"{name}.parquet")).iterate_samples())
        assert list_turns(sample) == TURNS
        assert len(sample.images) == 1 and sample.id == "#0"
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(UserError, match="has the columns text: expected `conversations`"):
        open_path(str(tmp_path / "text.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "is empty"),
        ("a.jsonl", "\n \n", "is empty"),
        ("a.json", "[]", "contains no records"),
        ("a.json", '[{"id": 1},\n {"id": }]', r"not valid JSON: Expecting value at line 2, column 9"),
        ("a.json", '[{"id": 1}\n {"id": 2}]', r"Expecting ',' at line 2, column 2"),
        ("a.json", '[{"id": 1},\n {"id": "2}]', r"Unterminated string starting at at line 2, column 9"),
        ("a.json", '[{"id": 1}]\n]', r"Extra data after the array at line 2, column 1"),
        ("a.json", '[{"id": 1},', r"Expecting value at line 1, column 12"),
        ("a.jsonl", '{"id": 1}\n{"id": 2', r"at line 2, column 9.*one JSON record a line"),
        ("a.json", '{\n "data": []\n}', r"at line 1, column 2.*or an array"),
        ("a.json", '[{"question": "what?"}]', r"a\.json: the first records have neither 'conversations' \(LLaVA\) nor"),
        ("a.json", "[" * 5000, r"not valid JSON: it is nested too deeply at line 1, column 2"),
        ("a.jsonl", '{"id": 1}\n' + '{"a":' * 5000, r"it is nested too deeply at line 2, column 1"),
        ("a.json", f'[{{"id": 1}}, {"9" * 5000}]', r"a number has too many digits at line 1, column 1"),
        ("a.json", b"\xff\xfe[\x00", r"a\.json is not (UTF-8 text|valid JSON)"),
    ],
)
def test_broken_files_say_where_and_what_was_expected(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        open_path(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value) and str(error.value).count("\n") <= 1


def test_what_is_missing(tmp_path, write, llava):
    with pytest.raises(UserError, match=r"data file .*nothing\.json not found"):
        open_path(str(tmp_path / "nothing.json"))
    with pytest.raises(UserError, match=r"image folder .*nowhere of .*data\.json does not exist"):
        open_path(write([llava("1", None, ("a", "b"))]), images=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"some/dataset is neither a local path nor readable from the Hub.*local file"):
        open_path("some/dataset")
    with pytest.raises(
        UserError, match=r"unknown data stamps:huge/captions\. .*tiny, small, full, pretrain or reading"
    ):
        open_path("stamps:huge/captions")
    for path in ("stamps:reading/captions", "stamps:reading"):
        with pytest.raises(UserError, match=rf"unknown data {path}\. The subsets of stamps:reading are words\."):
            open_path(path)  # said before 100,000 pictures are composed


def test_a_large_array_is_read_in_pieces(tmp_path, monkeypatch):
    """Pieces of 64 bytes: every record, string, escape and number is cut somewhere."""
    monkeypatch.setattr(json_records, "CHUNK", 64)
    records = [
        {"id": n, "text": 'né \\ " ☃ 😀' * (n % 7), "list": [n, {"deep": [1.5e-3, None, True]}]} for n in range(60)
    ]
    for indent, ascii_only in ((None, True), (1, False)):
        path = tmp_path / f"{indent}.json"
        path.write_text("\ufeff" + json.dumps(records, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
        assert [value for _, value in _json.parse_records(path)] == records
        assert [json.loads(text) for text, _ in _json.parse_records(path)] == records
    lines = json.dumps(records, indent=1).split("\n")
    lines[333] = lines[333].replace(":", ";") + ";"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 334"):
        list(_json.parse_records(path))


def test_half_an_emoji_is_replaced(write, tokenizer):
    source = open_path(write([{"id": "1", "messages": [{"role": "user", "content": "cut \ud83d here, whole 😀"}]}]))
    (message,) = next(source.iterate_samples()).messages
    assert message.text == "cut � here, whole 😀"
    tokenizer(message.text)


def test_converted_once_and_again_when_the_file_changes(write, llava, cache, monkeypatch):
    path = write([llava("1", None, ("a", "b"))])
    first = open_path(path)
    (arrow,) = (cache / "records").glob("*.arrow")
    monkeypatch.setattr(_json, "_convert", lambda *_: pytest.fail("converted twice"))
    assert open_path(path).fingerprint == first.fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("TINYLLAVA_CACHE", str(cache))
    write([llava("2", None, ("a", "b, changed"))])
    assert open_path(path).get_record(0)["id"] == "2"
    assert open_path(path).fingerprint != first.fingerprint
    copy = Path(path).with_name("copy.json")
    copy.write_bytes(Path(path).read_bytes())
    assert open_path(str(copy)).fingerprint == open_path(path).fingerprint  # of the content, wherever it lies
    assert arrow.exists()


def test_a_failed_conversion_leaves_nothing(tmp_path, cache):
    path = tmp_path / "a.json"
    path.write_text('[{"id": 1, "messages": []}, ' * 30)
    with pytest.raises(UserError):
        open_path(str(path), format="messages")
    assert [file.suffix for file in (cache / "records").iterdir()] == [".lock"]


def test_stamps_are_composed_once_and_read(cache, monkeypatch):
    folders = []

    def prepare_few(*arguments, **options) -> Path:
        folders.append(prepare_tier(*arguments, **options, scale=0.002))
        return folders[-1]

    monkeypatch.setattr("tinyllava.stamps.prepare_tier", prepare_few)
    for part in ("captions", "instructions", "validation"):
        source = open_path(f"stamps:tiny/{part}")
        samples = list(source.iterate_samples())
        assert len(samples) == len(source) >= 8 and source.path == f"stamps:tiny/{part}"
        for sample in samples:
            sample.check()
            assert all(open_image(image, source.roots).size == (64, 64) for image in sample.images)
    assert len(set(folders)) == 1 and folders[0].is_relative_to(cache)


def test_a_cache_that_cannot_be_written(tmp_path, write, llava, monkeypatch):
    path = write([llava("1", None, ("a", "b"))])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the cache .*file/records: .*Set TINYLLAVA_CACHE"):
        open_source(DataSpec(path=path), tmp_path / "file")

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.Path, "replace", full)
    with pytest.raises(UserError, match=r"cannot write to the cache .*records: No space left on device"):
        open_path(path)


def test_table_fingerprint_is_of_content_and_its_key_is_stable(tmp_path, cache):
    table = datasets.Dataset.from_list([{"messages": MESSAGES, "images": ["red.jpg"]}] * 3)
    for name in ("a", "b"):
        table.to_parquet(tmp_path / f"{name}.parquet")
    a, b = (open_path(str(tmp_path / f"{name}.parquet")) for name in "ab")
    assert a.fingerprint == b.fingerprint
    code = (
        "from tinyllava.config import DataSpec; from tinyllava.data.sources import open_source\n"
        f"source = open_source(DataSpec(path={str(tmp_path / 'a.parquet')!r})); print(source.key, source.fingerprint)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.split() == [a.key, a.fingerprint]


def test_a_source_travels_to_a_worker_as_a_file_name(write, llava):
    source = open_path(write([llava(str(n), None, ("question " * 50, "answer")) for n in range(2000)]))
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled).get_record(1999)["id"] == "1999"


@pytest.mark.parametrize("name", ["../a.png", "..a", ".", "a..b", "no_such.module"])
def test_a_format_that_is_no_module_is_refused(name: str, write, llava) -> None:
    with pytest.raises(UserError, match="cannot be imported"):
        open_source(DataSpec(path=write([llava("1", None, ("a", "b"))]), format=name))


@pytest.mark.parametrize("folder", ["A" * 300, "a\0b", "missing"])
def test_an_image_folder_that_cannot_be_is_refused(folder: str, write, llava) -> None:
    with pytest.raises(UserError, match=r"does not exist|file name too long"):
        open_source(DataSpec(path=write([llava("1", None, ("a", "b"))]), images=folder))
