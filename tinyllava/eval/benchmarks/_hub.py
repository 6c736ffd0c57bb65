"""The Hub's copies that lmms-eval reads: parquet files, whose rows hold a question and the bytes of its picture.

    ROOT/pope/data/test-00000-of-00003.parquet      as `tinyllava data prepare` or `hf download --local-dir` leave them

Pictures are written out once, into a folder beside the files that has the split's name (data/test/), so that all that
follows finds pictures as files, whichever layout a benchmark came in.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.progress import track

from tinyllava.console import messages
from tinyllava.data.prepare import shards
from tinyllava.errors import UserError

BATCH = 32  # rows read at a time when they come with their pictures, of a megabyte each at most

Row = dict[str, Any]


def tables(root: str | Path, folder: str, *patterns: str) -> list[Path]:
    """The parquet files of the first of `patterns` that fits any, under ROOT, ROOT/FOLDER or ROOT/eval/FOLDER."""
    places = [Path(root), Path(root) / folder, Path(root) / "eval" / folder]
    found = (sorted(place.glob(pattern)) for pattern in patterns for place in places)
    files = next((files for files in found if files), [])
    there, expected = shards(files)
    if there < expected:
        raise UserError(f"{files[0].parent} holds {there} of the {expected} files that {files[0].name} belongs to.")
    return files


def rows(
    files: list[Path], *columns: str, picture: str = "image", name: Callable[[Row], str] | None = None
) -> list[Row]:
    """The rows of `files` as dicts, with a file's path (or None) where the column `picture` holds a picture.

    `name(row)` is what the picture is to be called. `columns` must be there, or a UserError says what is instead.
    """
    found: list[Row] = []
    for folder, group in groupby(files, key=lambda file: file.parent / file.name.partition("-")[0]):
        parts = list(group)
        if name and not folder.is_dir():
            _unpack(parts, folder, picture, name)
        for row in _read(parts, (*columns, picture) if name else columns, picture):
            if name:
                row[picture] = str(folder / name(row)) if row[picture] is not None else None
            found.append(row)
    return found


def pictures(rows: list[Row], picture: str = "image") -> dict[str, str]:
    """The paths of the pictures of `rows` by their names: for questions of the release or of LLaVA on them."""
    return {Path(row[picture]).name: row[picture] for row in rows if row[picture]}


def records(value: Any) -> list[Row]:
    """A list of records, which older tables keep as a record of lists."""
    if isinstance(value, dict):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return value or []


def _read(files: list[Path], columns: tuple[str, ...], picture: str, whole: bool = False) -> Iterator[Row]:
    """The rows of a split, each with its `number`; of pictures only their original path, unless `whole`."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    for file in files:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            schema = parquet.schema_arrow
            lacking = [column for column in columns if column not in schema.names]
            if lacking:
                has = ", ".join(schema.names)
                raise UserError(f"{file} has no column {', '.join(lacking)} (it has {has}). Is it of this benchmark?")
            wanted = [f"{one.name}.path" if _is_picture(one.type) else one.name for one in schema]
            wanted += [f"{picture}.bytes"] if whole else []
            for batch in parquet.iter_batches(BATCH if whole else 1000, columns=wanted):
                for row in batch.to_pylist():
                    yield {**row, "number": number}
                    number += 1
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file} cannot be read as parquet ({error}). Remove it, and get it again.") from None


def _is_picture(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def _unpack(files: list[Path], folder: Path, picture: str, name: Callable[[Row], str]) -> None:
    """Write the pictures of `files` into `folder`, which is there only when all of them are."""
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # the processes of one evaluation come at once
            if folder.is_dir():
                return
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            shown = {"console": messages, "transient": True, "disable": not messages.is_terminal}
            rows = (row for row in _read(files, (), picture, whole=True) if row[picture] is not None)
            for row in track(rows, f"Pictures of {folder}", **shown):
                path = aside / name(row)
                if not path.is_relative_to(aside) or ".." in path.parts:
                    raise UserError(f"{files[0]} calls a picture {name(row)}, which is no place for it.")
                if not path.exists():  # one picture is in as many rows as it has questions
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(row[picture]["bytes"] or b"")
            os.replace(aside, folder)
    except PermissionError:
        raise UserError(
            f"the pictures in {files[0]} must be written out to {folder}, and that may not be written. "
            "Copy the files to a folder of yours."
        ) from None
