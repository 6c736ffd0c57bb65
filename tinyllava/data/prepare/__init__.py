"""Datasets by name: what lies where under a root, where each part comes from, and on what terms.

One YAML here is one dataset, and the file's name is its name: `tinyllava data prepare pope --root data`. Sizes, counts
and checksums are those that the publishers state; where they state none there is none.

    title, licence, page       for the reader; `about` is a sentence more
    questions                  how many a benchmark's default split has
    parts: [...]               files and folders, see Part
    annotations: [...]         of training data, see Annotations
"""

import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from tinyllava.errors import UserError
from tinyllava.factory import nearest

FOLDER = Path(__file__).parent
SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.parquet")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Part(Strict):
    """A file, a folder (`.../`) or a pattern of files under the root, and its one source.

    url: a file, or a zip that is unpacked there. hub: a dataset on the Hub, whose `file` (or pattern, or zip) it is.
    page: where people get it by hand, with `how`.
    """

    path: str
    also: list[str] = []  # the same in another form: one of them is as good
    url: str | None = None
    hub: str | None = None
    file: str | None = None
    page: str | None = None
    how: str = ""
    sha256: str | None = None
    files: int | None = None  # how many a folder holds
    optional: str = ""  # what it is for, if all works without it

    @model_validator(mode="after")
    def _one_source(self) -> "Part":
        if sum(source is not None for source in (self.url, self.hub, self.page)) != 1 or (self.hub and not self.file):
            raise ValueError(f"{self.path}: give one of `url`, `hub` with `file`, and `page`")
        return self

    @property
    def is_folder(self) -> bool:
        return self.path.endswith("/")

    @property
    def source(self) -> str:
        """For the reader."""
        return self.url or self.page or f"https://huggingface.co/datasets/{self.hub}"


class Annotations(Strict):
    """A training file: how many records it should hold, how many with a picture (if known), found under `images`."""

    path: str
    images: str
    records: int
    with_picture: int | None = None


class Dataset(Strict):
    """One YAML."""

    title: str
    licence: str
    page: str
    about: str = ""
    kind: Literal["benchmark", "training"]
    questions: int | None = None
    parts: list[Part]
    annotations: list[Annotations] = []


def names() -> list[str]:
    """All that `load` knows."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Dataset:
    """The dataset called `name`. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"unknown dataset '{name}'{nearest(name, names())} Known: {', '.join(names())}.")
    return Dataset.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))


def shards(files: list[Path]) -> tuple[int, int]:
    """How many of a table's files are there, and how many there should be: test-00000-of-00003.parquet says 3."""
    totals = {(file.parent, named[1]): int(named[2]) for file in files if (named := SHARD.fullmatch(file.name))}
    return len(files), sum(totals.values()) or len(files)


def find(part: Part, root: Path) -> list[Path]:
    """What is there of a part: under ROOT, or under ROOT/eval, where the original keeps benchmarks."""
    for place in (root, root / "eval"):
        for path in (part.path, *part.also):
            found = sorted(place.glob(path.rstrip("/")))
            if found:
                return found
    return []
