"""WebDataset: tar files in which the members of one record stand together and have its key as their name.

    {path: shards/train-*.tar, streaming: true}       {path: "hf://datasets/org/set/*.tar", streaming: true}

    0001.json        a LLaVA or `messages` record: its images are the members, whatever it names itself
    0001.jpg         the image; several are 0001.1.jpg, 0001.2.jpg, ... or 0001.left.jpg, 0001.right.jpg, by name

`datasets` reads such files too. It takes the columns of the JSON from the first five records, and drops the others.
"""

import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec

from tinyllava.cache import digest, hash_files
from tinyllava.config import DataSpec
from tinyllava.data.images import SUFFIXES
from tinyllava.data.sample import Sample, SampleError
from tinyllava.data.sources.source import Source, unpack
from tinyllava.errors import UserError, WorkerError

BLOCK = 512  # bytes: a tar file ends with blocks of zeros


def matches(path: str) -> bool:
    """Whether `path` names tar files, or a local folder that contains them."""
    return path.endswith(".tar") or (Path(path).is_dir() and next(Path(path).glob("*.tar"), None) is not None)


def read(spec: DataSpec, cache_dir: Path) -> Source:
    """The records of the tar files, as a stream. Each file is a shard. Raises UserError."""
    pattern = spec.path if spec.path.endswith(".tar") else f"{spec.path}/*.tar"
    try:
        system, place = fsspec.core.url_to_fs(pattern)
        files = sorted(system.glob(place))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot list {spec.path}: {' '.join(str(error).split())[:200]}.") from None
    if not files:
        raise UserError(f"data file {spec.path} not found. Check `path:`; relative paths start at {Path.cwd()}.")
    if not spec.streaming:
        raise UserError(f"{spec.path}: tar files are read one after the other. Set `streaming: true`.")
    named = digest(spec.path, *map(str, files))
    urls = {"files": [system.unstrip_protocol(file) for file in files]}
    records = datasets.IterableDataset.from_generator(_read_tars, gen_kwargs=urls)
    return Source(spec.path, records, to_sample, [], named, hash_files(pattern) or named)


def to_sample(record: dict[str, Any]) -> Sample:
    """The Sample of a raw record."""
    try:
        named = {name: value for name, value in unpack(record).items() if name not in ("image", "images")}
    except ValueError as error:
        raise SampleError("no_conversation", f"its .json is not valid JSON ({error})", record["id"]) from None
    return (Sample.from_messages if "messages" in named else Sample.from_llava)({**named, "images": record["pictures"]})


def _read_tars(files: list[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        try:
            with fsspec.open(file, "rb") as stream:
                stream.seek(-min(BLOCK, stream.size), 2)
                if stream.read().strip(b"\0"):  # tarfile takes a file that was cut for one that ends
                    raise EOFError("its end is missing")
                stream.seek(0)
                archive = tarfile.open(fileobj=stream, mode="r|")  # noqa: SIM115
                for key, group in groupby(_iterate_members(archive), lambda member: _split_name(member.name)[0]):
                    # Each is read before the next one is found: the archive is not rewound.
                    contents = {_split_name(member.name)[1]: archive.extractfile(member).read() for member in group}
                    yield _join_members(key, contents)
        except (tarfile.TarError, EOFError) as error:
            raise WorkerError(f"{file} is not a whole tar file ({error}). Copy or download it again.") from None


def _iterate_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in iter(archive.next, None):
        archive.members.clear()  # it would keep every header
        if member.isfile():
            member.size = 1 if member.issparse() else member.size  # holes are of any size: 10 kB can be a terabyte
            yield member


def _split_name(name: str) -> tuple[str, str]:
    """`a/0001.left.jpg` -> ("a/0001", ".left.jpg"): a key ends at the first dot of the file's name."""
    stem, dot, rest = PurePosixPath(name).name.partition(".")
    return str(PurePosixPath(name).with_name(stem)) if stem else name, (dot + rest).lower()


def _join_members(key: str, contents: dict[str, bytes]) -> dict[str, Any]:
    names = sorted((name for name in contents if name.endswith(SUFFIXES)), key=_order_numbers)
    text = contents.get(".json", b"null").decode("utf-8", "replace")
    return {"id": key, "record": text, "pictures": [contents[name] for name in names]}


def _order_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts `.10.jpg` after `.2.jpg`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
