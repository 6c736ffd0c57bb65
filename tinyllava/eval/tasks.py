"""What `--tasks` and `tinyllava score` name: a benchmark, one of its variants, or a JSONL of the user's own.

    pope   vqav2-val   textvqa-test-no-ocr   path/to/my.jsonl

A variant is the benchmark's name with words of its VARIANTS after it: a split, another prompt, an official rule that we
do not follow by default. Results are kept under the whole name, so that numbers of two variants never meet.
"""

from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question
from tinyllava.eval.choose import Choice, choice_of, split_choice
from tinyllava.factory import Factory

SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Task:
    """A benchmark with the options of one variant."""

    name: str  # its key in results.json, and its folder in eval/
    benchmark: Any
    options: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None  # the user's own questions, which need no data folder
    choice: Choice | None = None  # options are chosen by likelihood; None: answers are said in words

    @property
    def title(self) -> str:
        """What tables call it."""
        rest = self.name.partition("-")[2] if self.options or self.choice else ""
        return self.name if self.file else f"{self.benchmark.TITLE} {rest}".rstrip()

    def needs_data(self) -> bool:
        """Whether it must be told where its data lie."""
        return self.file is None and not hasattr(self.benchmark, "locate")

    def place(self, root: str | Path | None, trained_on: list[str] | None = None) -> str | Path:
        """Where its data lie. Raises UserError when nobody says."""
        if self.file is not None:
            return self.file
        if hasattr(self.benchmark, "locate"):
            return self.benchmark.locate(root, trained_on or [])
        if root is None:
            raise UserError(
                f"{self.name} needs its data: give --data ROOT, a folder with {self.benchmark.FOLDER}/ in it."
            )
        return root

    def questions(self, root: str | Path) -> list[Question]:
        """What to ask."""
        return self.benchmark.questions(root, **_among(self.options, self.benchmark.questions))

    def references(self, root: str | Path, **options: Any) -> list[Question]:
        """What scoring needs of the questions."""
        return self._references(root, **_among(self.options | options, self._references))

    def evaluate(self, root: str | Path, pairs: list[tuple[Question, Any]], **options: Any) -> dict[str, Any]:
        """The benchmark's own result."""
        function = self.benchmark.evaluate
        result = function(root, pairs, **_among(self.options | options, function))
        return result | {"metric": f"{result['metric']}, by {self.choice.name}"} if self.choice else result

    def check(self, options: dict[str, Any]) -> None:
        """Raise UserError for an option that neither the benchmark's `evaluate` nor its `references` takes."""
        known = _takes(self.benchmark.evaluate) | _takes(self._references)
        for name in options:
            if name not in known:
                raise UserError(f"{self.name} has no option '{name}'. It takes: {', '.join(sorted(known)) or 'none'}.")

    def is_judged(self) -> bool:
        """Whether a language model grades its answers."""
        return "ask" in _takes(self.benchmark.evaluate)

    @property
    def _references(self) -> Any:
        return getattr(self.benchmark, "references", self.benchmark.questions)


def _among(options: dict[str, Any], function: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in _takes(function)}


def _takes(function: Any) -> set[str]:
    return set(signature(function).parameters) - {"root", "pairs"}


def find_task(name: str) -> Task:
    """The task of that name. Raises UserError for an unknown benchmark or variant, with the known ones."""
    asked, per_token = split_choice(name)
    if asked.endswith(SUFFIX):
        if not Path(asked).is_file():
            raise UserError(f"there is no file {asked}. A task of your own is a JSONL of questions and answers.")
        benchmark, own = Factory("benchmarks").get("custom"), Path(asked).stem + name.removeprefix(asked)
        return Task(own, benchmark, file=Path(asked), choice=choice_of(name, benchmark, per_token))
    benchmark, options = Factory("benchmarks").resolve(asked, {})
    return Task(name, benchmark, options, choice=choice_of(name, benchmark, per_token))


def find_tasks(names: list[str]) -> list[Task]:
    """The tasks of these names. Raises UserError when two would share a name, and so their results."""
    tasks = [find_task(name) for name in names]
    for number, task in enumerate(tasks):
        if task.name in (other.name for other in tasks[:number]):
            raise UserError(f"two tasks are called '{task.name}'. Name each once; rename a file of your own.")
    return tasks
