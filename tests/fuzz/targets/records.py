"""Records in every convention, one at a time and as files, from the source to the tokenised row."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.harness import Case
from tests.fuzz.mutate import TEXTS, edit_bytes, edit_trees, make_values, split_words
from tests.tiny_vlm import build_tiny
from tinyllava.commands.check_data import check_specs
from tinyllava.config import DataSpec
from tinyllava.data.encode import Encoder
from tinyllava.data.options import DataOptions
from tinyllava.data.sample import FLAGS, KIND_OF_KEY, SYSTEM_KEYS, UNREAD_IMAGES, Sample
from tinyllava.data.sources import llava_json, messages, open_source
from tinyllava.data.sources.source import add_id
from tinyllava.data.template import Template
from tinyllava.data.tiles import Tiles
from tinyllava.errors import UserError

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
PARTS = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "And?"}]
LLAVA = [
    {
        "id": "1",
        "image": "a.png",
        "conversations": [*TURNS, {"from": "human", "value": "And?"}, {"from": "gpt", "value": "Blue."}],
    },
    {"id": 2, "image": ["a.png"], "conversations": TURNS, "weight": 1, "system": "Be brief."},
    {
        "id": "3",
        "image": {"bytes": None, "path": "a.png"},
        "conversations": [{**TURNS[0]}, {**TURNS[1], "train": True}],
    },
    {
        "id": "4",
        "conversations": [
            {"from": "system", "value": "Be."},
            {"from": "human", "value": "A"},
            {"from": "gpt", "value": "B"},
        ],
    },
    {"id": "5", "image": "data:image/png;base64,iVBORw0KGgo=", "conversations": TURNS, "objects": {"bbox": [[1, 2]]}},
]
MESSAGES = [
    {"id": "b", "messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "Blue."}]},
    {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": "<image>A"}, {"role": "assistant", "content": "B", "weight": 0}],
    },
    {
        "images": [{"bytes": None, "path": "a.png"}],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "B"}]},
        ],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
                    {"type": "input_text", "text": "A"},
                ],
            },
            {"role": "assistant", "content": "B"},
        ],
        "tools": [],
    },
]
KEYS = split_words("""
    id image images conversations messages from value role content type text url path bytes image_url objects
""")
KEYS += [*FLAGS, *KIND_OF_KEY, *SYSTEM_KEYS, *UNREAD_IMAGES]


def build(folder: Path) -> list[Case]:
    vlm = build_tiny()
    Image.new("RGB", (24, 17), "red").save(folder / "a.png")
    encoders = []
    for name, tiles, turns in (("phi", None, "all"), ("pretrain", None, "last"), ("llama", Tiles(4, 32), "all")):
        options = {"pixels": vlm.processor.to_pixels, "max_length": 120, "tiles": tiles, "supervised_turns": turns}
        encoders.append(Encoder(DataOptions(Template.load(name), vlm.tokenizer, 16, **options)))
    roots = [str(folder)]
    values = make_values(KEYS)
    records = st.one_of(edit_trees(LLAVA + MESSAGES, values), edit_trees(LLAVA + MESSAGES, values, most=1), values)
    numbers = st.integers(0, len(encoders) - 1)

    def encode_record(input: tuple[Any, int]) -> None:
        record, number = input
        encoder, row = encoders[number], {"id": "x", "record": json.dumps(record)}
        for module in (llava_json, messages):
            check_row(encoder.encode_record(row, module.to_sample, roots))
            if isinstance(record, dict):
                check_row(encoder.encode_record(add_id(record, 0), module.to_sample, roots))

    def read_record(record: Any) -> None:
        for read in (Sample.from_llava, Sample.from_messages):
            try:
                sample = read(record if isinstance(record, dict) else {"conversations": record, "messages": record})
            except UserError:
                continue
            sample.check()

    files = Files(folder)
    trees = st.lists(edit_trees(LLAVA + MESSAGES, values, most=2), max_size=4)
    return [
        Case("records: encode", st.tuples(records, numbers), encode_record),
        Case("records: read", records, read_record),
        Case(
            "records: JSON text",
            st.tuples(edit_bytes(write_texts()), st.sampled_from([".json", ".jsonl", ""])),
            files.open_text,
        ),
        Case("records: files", st.tuples(trees, st.sampled_from([".json", ".jsonl", ".parquet"])), files.check_data),
        Case(
            "records: fields",
            st.dictionaries(
                st.sampled_from(["path", "images", "format", "weight", "streaming", "split", "name"]),
                st.one_of(TEXTS, values),
                max_size=3,
            ),
            files.open_spec,
        ),
    ]


def check_row(row: dict[str, Any]) -> None:
    if row["problem"] is None:
        assert len(row["input_ids"]) == len(row["labels"]) and row["supervised"] > 0 and row["length"] <= 120, row
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True)), row


def write_texts() -> list[bytes]:
    texts = []
    for records in (LLAVA, MESSAGES, [LLAVA[0], MESSAGES[0]], LLAVA[:1]):
        texts += [json.dumps(records), json.dumps(records, indent=1), "\n".join(map(json.dumps, records))]
    texts += ["[" * 3000, '{"a":' * 3000, '[{"conversations": []}]', "\ufeff[]", '["\\ud83d"]', "[1" + "0" * 5000 + "]"]
    # Nested nearly as deep as Python's json reads: what comes after must not need more.
    texts += [f'[{{"messages": {"[" * depth}{"]" * depth}}}]' for depth in (200, 500, 900, 960, 980)]
    tables = []
    for records in (LLAVA[:1], MESSAGES[1:2]):
        stream = io.BytesIO()
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), stream)
        tables.append(stream.getvalue())
    return [text.encode() for text in texts] + tables


class Files:
    """Data files that are written, opened and checked as a whole, with a cache of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"

    def open_text(self, input: tuple[bytes, str]) -> None:
        content, suffix = input
        path = self.folder / f"data{suffix}"
        path.write_bytes(content)
        self._open({"path": str(path)})

    def open_spec(self, fields: dict[str, Any]) -> None:
        path = self.folder / "whole.json"
        path.write_text(json.dumps(LLAVA))
        try:
            spec = DataSpec.model_validate({"path": str(path), **fields})
        except ValueError:
            raise UserError("refused by the schema of a recipe") from None
        self._read(spec)

    def check_data(self, input: tuple[list[Any], str]) -> None:
        records, suffix = input
        path = self.folder / f"table{suffix}"
        if suffix == ".parquet":
            try:
                pyarrow.parquet.write_table(pa.Table.from_pylist([r for r in records if isinstance(r, dict)]), path)
            except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError, UnicodeError):
                raise UserError("no table holds these records") from None
        else:
            lines = [json.dumps(record) for record in records]
            path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
        report = check_specs([DataSpec(path=str(path))], progress=False)
        report.make_table()
        self._clear()

    def _open(self, fields: dict[str, Any]) -> None:
        self._read(DataSpec(**fields))

    def _read(self, spec: DataSpec) -> None:
        try:
            source = open_source(spec, self.cache)
            list(source.iterate_samples())
        finally:
            self._clear()

    def _clear(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)
