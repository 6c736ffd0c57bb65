import datasets
import pytest
import torch
from rich.console import Console

from tinyllava.commands import check_data as check_module
from tinyllava.commands.check_data import DataReport, check_specs
from tinyllava.config import DataSpec
from tinyllava.data.options import DataOptions
from tinyllava.data.template import Template


@pytest.fixture
def path(write, llava):
    image = "<image> what?"
    return write(
        [
            llava("good", "red.jpg", (image, "a red cat")),
            llava("text", None, ("hi", "hello")),
            llava("lost", "absent.jpg", (image, "a cat")),
            llava("cut", "broken.jpg", (image, "a cat")),
            llava("cut too", "broken.jpg", (image, "a dog")),
            llava("zero", "empty.jpg", (image, "a cat")),
            llava("both", "red.jpg", ("<image><image>", "a cat")),
            llava("none", "red.jpg", ("what?", "a cat")),
            llava("mute", None, ("hi", "  ")),
            {"id": "order", "conversations": [{"from": "gpt", "value": "me first"}]},
            {"id": "open", "conversations": [{"from": "human", "value": "and?"}]},
            {"id": "void", "image": "red.jpg"},
            llava("twin", None, ("hi", "hello")),
            llava("twin", None, ("hi", "hello again")),
            llava("long", None, ("word " * 300, "yes")),
            llava("talk", None, *[("question " * 10, "answer")] * 10),
        ]
    )


BAD_IDS = {
    "missing_image": ["lost"],
    "unreadable_image": ["cut", "cut too", "zero"],
    "placeholders": ["both", "none"],
    "empty_answer": ["mute"],
    "turn_order": ["order", "open"],
    "no_conversation": ["void"],
    "duplicate_id": ["twin"],
}


def list_ids(report: DataReport) -> dict[str, list[str]]:
    return {kind: entry["ids"] for kind, entry in report.bad_records.to_dict().items()}


def list_texts(report: DataReport) -> dict[str, str]:
    bad = report.bad_records
    return {identity: text for kind in bad.count_kinds() for identity, text in bad.list_first(kind)}


def test_a_bare_file(path, folder):
    report = check_specs([DataSpec(path=path, images=str(folder))], progress=False)
    assert list_ids(report) == BAD_IDS
    assert not report.is_ok
    assert (report.records, report.images) == (16, 4)  # red, absent, broken, empty: each file is decoded once
    texts = list_texts(report)
    assert "absent.jpg not found under" in texts["lost"]
    assert "cannot be decoded" in texts["cut"] and "broken.jpg" in texts["cut"]
    assert "2 <image> in its text, but 1 image" in texts["both"]


def test_with_a_tokenizer_lengths_too(path, folder, tokenizer):
    specs = [DataSpec(path=path, images=str(folder))]
    options = DataOptions(Template.load("phi"), tokenizer, tokens_per_image=5, pixels=torch.stack, max_length=400)
    report = check_specs(specs, options, progress=False)
    assert list_ids(report) == {**BAD_IDS, "too_long": ["long"], "shortened": ["talk"]}
    texts = list_texts(report)
    assert "max_length 400" in texts["long"] and "of 10 rounds" in texts["talk"]


def test_a_clean_file(write, llava, folder):
    data = [llava("1", "red.jpg", ("<image>?", "a cat")), llava("2", None, ("hi", "hello"))]
    report = check_specs([DataSpec(path=write(data), images=str(folder))], progress=True)
    assert report.is_ok and not report.make_table().row_count
    assert (report.records, report.images, report.text_only) == (2, 1, 1)


def test_pictures_beside_a_file_given_by_name(write, llava, folder):
    path = write([llava("1", "pictures/red.jpg", ("<image>?", "a cat"))])
    assert check_specs([path], progress=False).is_ok


def test_table_shows_kinds_counts_and_first_records(path, folder):
    report = check_specs([DataSpec(path=path, images=str(folder))], progress=False)
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.make_table(first=2))
    text = console.export_text()
    assert "16 records, 4 images" in text
    assert "image cannot be read" in text and "cut too" in text and "zero" not in text and "1 more" in text


def test_embedded_pictures_and_processes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(check_module, "FEW", 2)
    monkeypatch.setattr(check_module.os, "cpu_count", lambda: 2)
    names = ["red", "broken", "green", "blue", "broken"]
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "yes"}]
    records = [
        {
            "id": f"{n} {name}",
            "messages": turns,
            "images": [{"bytes": (folder / f"{name}.jpg").read_bytes(), "path": None}],
        }
        for n, name in enumerate(names)
    ]
    table = datasets.Dataset.from_list(records).cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(tmp_path / "data.parquet")
    for streaming in (False, True):
        report = check_specs([DataSpec(path=str(tmp_path / "data.parquet"), streaming=streaming)], progress=False)
        assert list_ids(report) == {"unreadable_image": ["1 broken", "4 broken"]}
        assert report.images == 5
