"""Tables: `datasets.load_dataset` ids, Parquet files, dataset folders and `save_to_disk` folders. All can stream.

    {path: org/some-set, name: a-config, split: train}    {path: data/part-*.parquet}    {path: my_saved_dataset}

The columns decide the format of the records: `conversations` (and `image`) is LLaVA's, `messages` (and `images`) is the
Hub's. Images may be paths, bytes or the Image feature. They stay encoded until a worker needs them.
"""

import re
from pathlib import Path

import datasets

import tinyllava.data.sources.llava_json as llava_json
import tinyllava.data.sources.messages as messages
from tinyllava.cache import digest, hash_files, list_files, open_entry
from tinyllava.config import DataSpec
from tinyllava.data.sources._json import SUFFIXES
from tinyllava.data.sources.source import Source, list_image_folders, map_tables
from tinyllava.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HASHED = 32  # records at each end that go into the fingerprint


def matches(path: str) -> bool:
    """Whether `path` is a folder, a pattern, a Parquet file or the id of a dataset on the Hub."""
    file = Path(path)
    if file.is_dir() or "*" in path or file.suffix == ".parquet":
        return True
    return bool(HUB_ID.fullmatch(path)) and not file.exists() and file.suffix not in SUFFIXES


def read(spec: DataSpec, cache_dir: Path) -> Source:
    """The records of the table. Its columns decide whether they are LLaVA's or the Hub's. Raises UserError."""
    try:
        records = _load(spec, cache_dir)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_explain(spec, error)) from None
    columns = records.column_names or list(next(iter(records), {}))
    if "__url__" in columns:
        tars = f"hf://datasets/{spec.path}/**/*.tar"
        raise UserError(f"{spec.path} consists of tar files. Name them: `path: {tars}`, with `streaming: true`.")
    if "conversations" not in columns and "messages" not in columns:
        raise UserError(
            f"{spec.path} has the columns {', '.join(columns)}: expected `conversations` (LLaVA) or `messages`. "
            "Rename the column, or write a format of your own and name it in `format:`."
        )
    record_format = messages if "messages" in columns else llava_json
    local = Path(spec.path)
    roots = list_image_folders(spec, [str(local if local.is_dir() else local.parent)] if local.exists() else [])
    if isinstance(records, datasets.IterableDataset):
        named = digest(spec.path, spec.name, spec.split, columns)
        local_files = hash_files(spec.path)
        if local_files:  # on the Hub, only the names are known
            records = records.reshard()  # by row group, which opens every file
        stream = records.decode(False)
        if records._ex_iterable.iter_arrow:  # rows of Python objects may have types that Arrow cannot join
            stream = stream.with_format("arrow")
        return Source(spec.path, stream, record_format.to_sample, roots, named, local_files or named)
    records = records.with_format("arrow")  # undecoded
    content = hash_records(records), records._fingerprint
    return Source(spec.path, records, record_format.to_sample, roots, *content, mapped_stream=spec.streaming)


def _load(spec: DataSpec, cache_dir: Path) -> datasets.Dataset | datasets.IterableDataset:
    path = Path(spec.path)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if spec.split not in saved:
                raise ValueError(f"unknown split '{spec.split}'; it has {', '.join(saved)}")
            saved = saved[spec.split]
        return saved
    # What comes from the Hub stays in the Hub's own cache.
    cache = str(cache_dir / "datasets") if path.suffix == ".parquet" or path.is_dir() else None
    named = {"path": spec.path, "name": spec.name, "split": spec.split}
    if path.suffix == ".parquet":
        named = {"path": "parquet", "data_files": str(path), "split": "train"}
    elif not path.exists() and not HUB_ID.fullmatch(spec.path):
        raise FileNotFoundError("no such file or folder")
    if spec.streaming or cache is None:
        return datasets.load_dataset(**named, streaming=spec.streaming, cache_dir=cache)

    def convert() -> list[Path]:
        table = datasets.load_dataset(**named, cache_dir=cache, download_mode="force_redownload")
        return [Path(file["filename"]) for file in table.cache_files]

    times = [file.stat().st_mtime_ns for file in list_files(spec.path)]
    target = Path(cache) / f"{digest(hash_files(spec.path), spec.path, times, spec.name, spec.split)}.arrow"
    table = open_entry(target, spec.path, convert, map_tables)
    table._fingerprint = target.stem  # of the content: its own is of the times of the files in the cache
    return table


def _explain(spec: DataSpec, error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if Path(spec.path).exists() or "*" in spec.path:
        return f"cannot read the dataset {spec.path}: {first}."
    return (
        f"dataset {spec.path} is neither a local path nor readable from the Hub: {first}. "
        "Check the name and the network, or give a local file or folder."
    )


def hash_records(records: datasets.Dataset) -> str:
    """A hash of the count, the columns and 32 records at each end: reading all records may take hours."""
    count = len(records)
    ends = [*range(min(HASHED, count)), *range(max(HASHED, count - HASHED), count)]
    return digest(count, sorted(records.column_names), *(digest(records[row].to_pylist()[0]) for row in ends))
