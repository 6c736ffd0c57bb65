"""Tables: `datasets.load_dataset` ids, Parquet files, local dataset folders and `save_to_disk` folders; streaming too.

    {path: org/some-set, name: a-config, split: train}    {path: data/part-*.parquet}    {path: my_saved_dataset}

Columns decide the record: `conversations` (+ `image`) is LLaVA's, `messages` (+ `images`) is the Hub's. Pictures may be
paths, bytes or the Image feature; they stay encoded until a worker wants them.
"""

import hashlib
from pathlib import Path
from typing import Any

import datasets

from tinyllava.config import DataSpec
from tinyllava.data.cache import digest
from tinyllava.data.sources import HUB_ID, Source, llava_json, messages, roots_of
from tinyllava.errors import UserError

SAMPLED = 32  # records at either end that go into the fingerprint


def matches(path: str) -> bool:
    file = Path(path)
    if file.is_dir() or "*" in path or file.suffix == ".parquet":
        return True
    return bool(HUB_ID.fullmatch(path)) and not file.exists() and file.suffix not in (".json", ".jsonl", ".ndjson")


def read(spec: DataSpec, cache_dir: Path) -> Source:
    try:
        records = _load(spec, cache_dir)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_explain(spec, error)) from None
    columns = records.column_names or list(next(iter(records), {}))
    if "conversations" not in columns and "messages" not in columns:
        raise UserError(
            f"{spec.path} has the columns {', '.join(columns)}: expected `conversations` (LLaVA) or `messages`. "
            "Rename the column, or write a format of your own and name it in `format:`."
        )
    to_sample = messages.to_sample if "messages" in columns else llava_json.to_sample
    local = Path(spec.path)
    roots = roots_of(spec, [str(local if local.is_dir() else local.parent)] if local.exists() else [])
    if isinstance(records, datasets.IterableDataset):
        key = digest(spec.path, spec.name, spec.split, columns)
        return Source(spec.path, records.decode(False), to_sample, roots, key, key)
    records = records.with_format("arrow")  # undecoded
    return Source(spec.path, records, to_sample, roots, fingerprint(records), records._fingerprint)


def _load(spec: DataSpec, cache_dir: Path) -> datasets.Dataset | datasets.IterableDataset:
    path = Path(spec.path)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if spec.split not in saved:
                raise ValueError(f"unknown split '{spec.split}'; it has {', '.join(saved)}")
            saved = saved[spec.split]
        return saved.to_iterable_dataset() if spec.streaming else saved
    if path.suffix == ".parquet":
        cache = str(cache_dir / "datasets")
        return datasets.load_dataset(
            "parquet", data_files=str(path), split="train", streaming=spec.streaming, cache_dir=cache
        )
    if not path.exists() and not HUB_ID.fullmatch(spec.path):
        raise FileNotFoundError("no such file or folder")
    cache = (
        str(cache_dir / "datasets") if path.is_dir() else None
    )  # what comes from the Hub stays in the Hub's own cache
    return datasets.load_dataset(spec.path, spec.name, split=spec.split, streaming=spec.streaming, cache_dir=cache)


def _explain(spec: DataSpec, error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if Path(spec.path).exists() or "*" in spec.path:
        return f"cannot read the dataset {spec.path}: {first}."
    return (
        f"dataset {spec.path} is neither a local path nor readable from the Hub: {first}. "
        "Check the name and the network, or give a local file or folder."
    )


def fingerprint(records: datasets.Dataset) -> str:
    """A hash of the count, the columns and 32 records at either end: reading everything may take hours."""
    count = len(records)
    ends = [*range(min(SAMPLED, count)), *range(max(SAMPLED, count - SAMPLED), count)]
    rows = (_hashable(records[row].to_pylist()[0]) for row in ends)
    return digest(count, sorted(records.column_names), *rows)


def _hashable(value: Any) -> Any:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, dict):
        return {key: _hashable(item) for key, item in value.items()}
    return [_hashable(item) for item in value] if isinstance(value, list) else value
