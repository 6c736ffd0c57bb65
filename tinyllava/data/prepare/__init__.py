"""Datasets by name: which files belong where under a root folder, where to download them, and under which licence.

Each YAML file here describes the dataset of its name: `tinyllava data prepare pope --root data`. Sizes, counts
and checksums are those that the publisher states; they are left out if the publisher states none.

    title, licence, page       shown to the user; `about` adds a sentence
    questions                  the number of questions in a benchmark's default split
    parts: [...]               files and folders: a list of Item
    annotations: [...]         the training files among them: a list of Annotations

fetch.py downloads one item, and check.py reports what is present and what is missing.
"""

import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, Field, model_validator

from tinyllava.errors import UserError
from tinyllava.factory import suggest_known

FOLDER = Path(__file__).parent
SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.parquet")


class Item(BaseModel, extra="forbid"):
    """A file, a folder (`.../`) or a pattern of files under the root, and its one source.

    url: a file, or a zip to unpack there.
    hub: a dataset on the Hub, with `file`: a file, a pattern or a zip in it.
    page: where to download it by hand, with `how`.
    """

    path: str
    also: list[str] = []  # the same data in other forms: any one of them is enough
    url: str | None = None
    hub: str | None = None
    file: str | None = None
    page: str | None = None
    how: str = ""
    sha256: str | None = None
    files: int | None = None  # the number of files in a folder
    optional: str = ""  # what the item is for, if everything works without it

    @model_validator(mode="after")
    def _check_one_source(self) -> "Item":
        if sum(source is not None for source in (self.url, self.hub, self.page)) != 1 or (self.hub and not self.file):
            raise ValueError(f"{self.path}: give exactly one of `url`, `hub` with `file`, and `page`")
        return self

    @property
    def is_folder(self) -> bool:
        """Whether the path ends in a slash."""
        return self.path.endswith("/")

    @property
    def source(self) -> str:
        """The address to show to the user."""
        return self.url or self.page or f"https://huggingface.co/datasets/{self.hub}"


class Annotations(BaseModel, extra="forbid"):
    """A training file: how many records it should hold, and how many of them with an image (if known).

    `images` is the folder of the images that the records name.
    """

    path: str
    images: str
    records: int
    with_picture: int | None = None


class DatasetDescription(BaseModel, extra="forbid"):
    """One YAML file. As in all classes here, a key that is not a field is an error."""

    title: str
    licence: str
    page: str
    about: str = ""
    kind: Literal["benchmark", "training"]
    questions: int | None = None
    items: list[Item] = Field(alias="parts")
    annotations: list[Annotations] = []


def list_datasets() -> list[str]:
    """Return the names that `load_description` knows."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_description(name: str) -> DatasetDescription:
    """Load the description of the dataset called `name`. Raises UserError for an unknown name."""
    names = list_datasets()
    if name not in names:
        raise UserError(f"unknown dataset '{name}'{suggest_known(name, names)}")
    return DatasetDescription.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))


def count_shards(files: list[Path]) -> tuple[int, int]:
    """Return how many files of a table are present, and how many it has: test-00000-of-00003.parquet means 3."""
    matches = [(file.parent, SHARD.fullmatch(file.name)) for file in files]
    totals = {(folder, match[1]): int(match[2]) for folder, match in matches if match}
    return len(files), sum(totals.values()) or len(files)


def find_item(item: Item, root: Path) -> list[Path]:
    """Return the files of an item under ROOT, or under ROOT/eval, where the original code keeps benchmarks."""
    for folder in (root, root / "eval"):
        for path in (item.path, *item.also):
            files = sorted(folder.glob(path.rstrip("/")))
            if files:
                return files
    return []
