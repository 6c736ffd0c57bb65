"""Find the tasks that `--tasks` and `tinyllava score` name.

    pope   vqav2-val   textvqa-test-no-ocr      a benchmark, or one of its variants
    path/to/my.jsonl                            your own questions
    my_package.my_module:MyBenchmark            your own benchmark

The name of a variant is the benchmark's name and then words of its `variants`: a split, another prompt, or an official
rule that is not the default here. Results are stored under the whole name, so that two variants are never mixed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Benchmark, Pair, Question, Root
from tinyllava.eval.benchmarks._files import explain_form
from tinyllava.eval.choose import Choice, build_choice, split_choice
from tinyllava.factory import Factory

JSONL = ".jsonl"


@dataclass(frozen=True)
class Task:
    """A benchmark with the options of one variant."""

    name: str  # its key in results.json, and its folder in eval/
    title: str  # its name in tables
    benchmark: Benchmark
    file: Path | None = None  # a user's own questions; they require no data folder
    choice: Choice | None = None  # how an option is chosen by likelihood; None: answers are generated

    def check_root(self, root: Root | None) -> None:
        """Raise UserError if the task requires --data ROOT and `root` is None."""
        if root is None and self.file is None and self.benchmark.needs_root:
            folder = self.benchmark.folder
            content = f", a folder that contains {folder}/" if folder else ""
            raise UserError(f"{self.name} requires its data: give --data ROOT{content}.")

    def locate(self, root: Root | None, trained_on: Iterable[str] = ()) -> Root:
        """Find the task's data; returns the `root` for the benchmark. Raises UserError if there are none."""
        self.check_root(root)
        return self.file or self.benchmark.locate(root, trained_on)

    def read_questions(self, root: Root, for_scoring: bool = False) -> list[Question]:
        """The questions to ask, or those for scoring an answers file. Raises UserError for data of another form."""
        with explain_form(f"the data of {self.name} in {root}", "Is it of the expected release?"):
            return self.benchmark.references(root) if for_scoring else self.benchmark.questions(root)

    def evaluate(self, root: Root, pairs: list[Pair]) -> dict[str, Any]:
        """The benchmark's result. With a choice by likelihood, its metric says so."""
        with explain_form(f"the data of {self.name} in {root}, or an answer,", "Is it of the expected release?"):
            result = self.benchmark.evaluate(root, pairs)
        return result | {"metric": f"{result['metric']}, by {self.choice.name}"} if self.choice else result

    def set_options(self, **options: Any) -> "Task":
        """A copy of this task with other options of its benchmark. Raises UserError for an unknown option."""
        known = sorted(option.name for option in fields(self.benchmark))
        for name in options:
            if name not in known:
                raise UserError(f"{self.name} has no option '{name}'. It takes: {', '.join(known) or 'none'}.")
        benchmark = replace(self.benchmark, **options)
        choice = self.choice._replace(benchmark=benchmark) if self.choice else None
        return replace(self, benchmark=benchmark, choice=choice)


def find_task(name: str) -> Task:
    """Find a task by its name. The UserError for an unknown benchmark or variant lists the known ones."""
    short_name, per_token = split_choice(name)
    if short_name.endswith(JSONL):
        file = Path(short_name)
        if not file.is_file():
            raise UserError(f"there is no file {short_name}. Give a JSONL file of questions and answers.")
        benchmark, key = Factory("benchmarks").get("custom")(), file.stem + name.removeprefix(short_name)
        return Task(key, key, benchmark, file, build_choice(name, benchmark, per_token))
    if Path(short_name).is_file() and short_name not in Factory("benchmarks").list_names():
        raise UserError(f"{short_name} is not a task. A file of your own questions has a name that ends in {JSONL}.")
    benchmark_class, options = resolve_benchmark(short_name)
    benchmark = benchmark_class(**options)
    choice = build_choice(name, benchmark, per_token)
    words = (name.partition(":")[2] or name).partition("-")[2] if options or choice else ""
    return Task(name, f"{benchmark.title} {words}".rstrip(), benchmark, choice=choice)


def resolve_benchmark(name: str) -> tuple[type[Benchmark], dict[str, Any]]:
    """The class of a benchmark and the options that the variant in its name stands for."""
    benchmark, options = Factory("benchmarks").resolve(name, {})
    if not (isinstance(benchmark, type) and issubclass(benchmark, Benchmark)):
        raise UserError(f"{name} is not a benchmark: its class must inherit from tinyllava.eval.benchmarks.Benchmark.")
    missing = [each for each in ("title", "scorer", "questions") if not _defines(benchmark, each)]
    if missing:
        raise UserError(f"benchmark {name} does not define {', '.join(missing)}: see docs/add-your-own-benchmark.md.")
    return benchmark, options


def _defines(benchmark: type[Benchmark], attribute: str) -> bool:
    """Whether a class, or one that it inherits from, gives what the contract leaves open."""
    return any(attribute in each.__dict__ for each in benchmark.__mro__ if each is not Benchmark)


def find_tasks(names: list[str]) -> list[Task]:
    """Find several tasks. Raises UserError if two have the same name, because they would overwrite each other."""
    tasks = [find_task(name) for name in names]
    for number, task in enumerate(tasks):
        if task.name in (earlier.name for earlier in tasks[:number]):
            raise UserError(f"two tasks are called '{task.name}'. Give each task once, or rename your file.")
    return tasks
