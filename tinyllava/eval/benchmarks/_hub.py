"""Read the Hub's tables, which lmms-eval reads too: parquet files with a question and the bytes of its image in a row.

    ROOT/pope/data/test-00000-of-00003.parquet      where `tinyllava data prepare` or `hf download --local-dir` put it

The images are unpacked once, into a folder beside the files with the name of the split (data/test/). So all other code
reads images from files, whatever the layout of a benchmark.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.progress import track

from tinyllava.atomic import write_directory
from tinyllava.console import messages
from tinyllava.data.prepare import count_shards
from tinyllava.errors import UserError

BATCH = 32  # rows in memory together with their images; an image can have a megabyte
TEXT_BATCH = 1000  # rows in memory without images

Row = dict[str, Any]


def find_tables(places: Sequence[Path], patterns: Sequence[str]) -> list[Path]:
    """Find parquet files: those of the first of `patterns` that matches, in the first of `places` where it does.

    Returns [] if no pattern matches. Raises UserError if some files of a table are missing.
    """
    matches = (sorted(place.glob(pattern)) for pattern in patterns for place in places)
    files = next((files for files in matches if files), [])
    present, expected = count_shards(files)
    if present < expected:
        raise UserError(
            f"{files[0].parent} holds {present} of the {expected} files that {files[0].name} belongs to."
            " Download the missing ones."
        )
    return files


def read_rows(
    files: Sequence[Path], columns: Sequence[str], *, image: str = "image", name: Callable[[Row], str] | None = None
) -> list[Row]:
    """Read the rows of `files` as dicts. The column `image` then holds the path of the image, or None.

    `name(row)` is the file name for the row's image. Without `name`, images are not read. The UserError for a missing
    column names the columns of the table.
    """
    rows: list[Row] = []
    for folder, group in groupby(files, key=lambda file: file.parent / file.name.partition("-")[0]):
        shard_files = list(group)
        if name and not folder.is_dir():
            _unpack_images(shard_files, folder, image, name)
        for row in _iterate_rows(shard_files, (*columns, image) if name else columns, image):
            if name:
                row[image] = str(folder / name(row)) if row[image] is not None else None
            rows.append(row)
    return rows


def to_records(value: Any) -> list[Row]:
    """Convert a record of lists, as in older tables, into a list of records."""
    if isinstance(value, dict):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return value or []


def _iterate_rows(files: Sequence[Path], columns: Sequence[str], image: str, with_bytes: bool = False) -> Iterator[Row]:
    """Yield the rows of a split with their `number`. Of an image, only the path is read, or also the bytes."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    for file in files:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            schema = parquet.schema_arrow
            missing = [column for column in columns if column not in schema.names]
            if missing:
                present = ", ".join(schema.names)
                raise UserError(
                    f"{file} has no column {', '.join(missing)} (it has {present}). Is it a file of this benchmark?"
                )
            # Only the path of an image: its bytes are most of the file, and reading text must not load them.
            selected = [f"{cell.name}.path" if _is_image(cell.type) else cell.name for cell in schema]
            selected += [f"{image}.bytes"] if with_bytes else []
            for batch in parquet.iter_batches(BATCH if with_bytes else TEXT_BATCH, columns=selected):
                for row in batch.to_pylist():
                    yield {**row, "number": number}
                    number += 1
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file} cannot be read as parquet ({error}). Delete it and download it again.") from None


def _is_image(kind: Any) -> bool:
    """Whether an Arrow type is that of the Hub's images."""
    import pyarrow

    return pyarrow.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def _unpack_images(files: Sequence[Path], folder: Path, image: str, name: Callable[[Row], str]) -> None:
    """Write the images of `files` into `folder`. The folder appears only when it is complete."""
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # the processes of one evaluation start together
            if folder.is_dir():
                return
            with write_directory(folder) as partial:
                _write_images(files, partial, image, name, str(folder))
    except PermissionError:
        raise UserError(
            f"the images in {files[0]} must be unpacked to {folder}, but you may not write there. "
            "Copy the files to a folder of yours."
        ) from None


def _write_images(files: Sequence[Path], folder: Path, image: str, name: Callable[[Row], str], title: str) -> None:
    """Write each image of `files` once. `title`: the name for the progress bar."""
    shown = {"console": messages, "transient": True, "disable": not messages.is_terminal}
    rows = (row for row in _iterate_rows(files, (), image, with_bytes=True) if row[image] is not None)
    for row in track(rows, f"Images of {title}", **shown):
        path = folder / name(row)
        # The name comes from the table: a file outside the folder must not be written.
        if not path.is_relative_to(folder) or ".." in path.parts:
            raise UserError(f"{files[0]} names an image {name(row)}, which is outside its folder.")
        if not path.exists():  # an image is in as many rows as it has questions
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row[image]["bytes"] or b"")
