"""Find a benchmark's files under a data root, in the three layouts in which they are published.

    ROOT/pope/llava_pope_test.jsonl                 LLaVA's eval.zip: questions with LLaVA's prompts and ids
    ROOT/pope/coco/coco_pope_random.json            the official release: questions and right answers
    ROOT/pope/data/test-00000-of-00003.parquet      the Hub's tables: rows with a question, an answer and an image

The layouts can be mixed: LLaVA's file has no right answers, so it needs one of the other two. The images may be in a
folder or in the Hub's tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Root
from tinyllava.eval.benchmarks._hub import Row, find_tables, read_rows


@dataclass(frozen=True)
class DataFiles:
    """The files of the benchmark `task`. They are in ROOT, in ROOT/FOLDER or in ROOT/eval/FOLDER."""

    task: str  # its name for `tinyllava data prepare`
    folder: str

    def list_places(self, root: Root) -> list[Path]:
        """The folders that may hold the files, in the order in which they are searched."""
        return [Path(root), Path(root) / self.folder, Path(root) / "eval" / self.folder]

    def find(self, root: Root, *names: str) -> Path | None:
        """The path of the first of `names` that exists; None if none does."""
        places = self.list_places(root)
        return next((place / name for name in names for place in places if (place / name).exists()), None)

    def require(self, root: Root, *names: str, hint: str = "") -> Path:
        """Like `find`, but if no file exists, raises a UserError with all names and places.

        `names` may include patterns of the Hub's tables. They never match a file here; they are for the error only.
        """
        path = self.find(root, *names)
        if path is None:
            first, second, third = self.list_places(root)
            where = f"{first}, {second} or {third}"
            raise UserError(f"expected {' or '.join(names)} in {where}, but found none. {hint or self.suggest()}")
        return path

    def suggest(self) -> str:
        """The last sentence of an error: how to get missing files."""
        return f"`tinyllava data prepare {self.task}` downloads them, or prints where to get them."

    def find_tables(self, root: Root, *patterns: str) -> list[Path]:
        """The parquet files of the first of `patterns` that matches; [] if none does."""
        return find_tables(self.list_places(root), patterns)

    def read_rows(
        self,
        root: Root,
        patterns: Sequence[str],
        columns: Sequence[str],
        *,
        name: Callable[[Row], str] | None = None,
        image: str = "image",
    ) -> list[Row]:
        """The rows of the Hub's tables; [] if there are no tables. See `_hub.read_rows`."""
        return read_rows(self.find_tables(root, *patterns), columns, image=image, name=name)

    def find_images(
        self, root: Root, folder: str, rows: Sequence[Row], parent: Path | None = None
    ) -> Callable[[str], str]:
        """A function that returns the path of an image by its name: in `folder`, or among the images of `rows`.

        If there is neither, the path is in `parent`/`folder` (default: ROOT/FOLDER), so that the error can name it.
        """
        path = self.find(root, folder)
        unpacked = {} if path else {Path(row["image"]).name: row["image"] for row in rows if row["image"]}
        path = path or (parent or Path(root) / self.folder) / folder
        return lambda name: unpacked.get(name, str(path / name))
