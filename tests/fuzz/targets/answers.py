"""Answers files in our form and in those of official tools, the data of benchmarks, and files of results."""

import io
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from rich.console import Console

from tests.fuzz.harness import Case
from tests.fuzz.mutate import edit_bytes, edit_trees, make_values, split_words
from tinyllava.commands.score import score_file
from tinyllava.eval import compare, intervals, results
from tinyllava.eval.answers import claim_folder, join_process_files, read_answers
from tinyllava.eval.benchmarks import Question, mme, pope, to_answer_fields
from tinyllava.eval.results import RESULTS
from tinyllava.eval.table import print_scores
from tinyllava.eval.tasks import Task, find_task

FIXTURES = Path(__file__).parents[2] / "eval/oracles"
NAMES = ("gqa", "mme", "mmmu", "mmvet", "pope", "scienceqa", "textvqa", "vqav2")
KEYS = split_words("""
    question_id questionId id text response prediction answer prompt metadata results outputs question image
    category score gold parsed tasks title metric scorer data root interval categories made_with items options
    answers
""")
OWN = [
    {"question_id": 1, "text": "Is it?", "answer": "yes"},
    {"question_id": "b", "text": "Which?", "answer": "red", "options": ["red", "blue"], "category": "x"},
    {"question_id": 3, "text": "What?", "answer": ["a", "b", "a"], "image": "a.png"},
]


class Seeds(NamedTuple):
    """A task, the folder of its data (None: its own questions), valid answers, and their official form."""

    task: Task
    root: Path
    answers: list[dict[str, Any]]
    official: dict[str, bytes]


def read_seeds(name: str, folder: Path) -> Seeds:
    """A fixture's data in `folder`, with right answers to the first questions."""
    root = folder / name
    shutil.copytree(FIXTURES / f"{name}_fixture", root)
    task = find_task(name)
    questions = task.benchmark.references(task.locate(str(root)))
    return Seeds(task, root, [to_record(question) for question in questions], write_official(name, questions, root))


def to_record(question: Question) -> dict[str, Any]:
    answer = question.answer[0] if isinstance(question.answer, list | tuple) and question.answer else question.answer
    return {**to_answer_fields(question), "text": str(answer)}


def write_official(name: str, questions: list[Question], root: Path) -> dict[str, bytes]:
    """Files of the official tool by name, in one folder; {} where it has none of its own."""
    if name == "pope":
        groups = {c: [q for q in questions if q.category == c] for c in pope.CATEGORIES}
        lines = {
            c: [json.dumps({"question": q.text.split("\n")[0], "answer": "Yes"}) for q in groups[c]] for c in groups
        }
        return {f"coco_pope_{c}_answers.json": "\n".join(lines[c]).encode() for c in lines}
    if name == "mme":
        task = find_task("mme")
        result = task.evaluate(str(root), [(q, to_record(q)) for q in questions])
        assert isinstance(task.benchmark, mme.Benchmark)
        return {Path(each).name: text.encode() for each, text in result["files"].items() if each.endswith(".txt")}
    if name == "mmmu":
        paths = (root / "parse_and_eval_input").glob("*/output.json")
        return {f"{path.parent.name}/output.json": path.read_bytes() for path in paths}
    if name == "scienceqa":
        return {"results.json": json.dumps({"results": {q.id: 0 for q in questions}, "outputs": {}}).encode()}
    return {}


class Folder:
    """Scores what is written into a folder, which is emptied before every input."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "scores"
        intervals.DRAWS = compare.DRAWS = 50  # nearly all the time goes into draws, which see only numbers
        results.get_versions = cache(results.get_versions)
        self.console = Console(file=io.StringIO())
        self.seeds = [read_seeds(name, folder) for name in NAMES]
        own = folder / "own.jsonl"
        own.write_text("".join(json.dumps(line) + "\n" for line in OWN))
        answers = [{"question_id": line["question_id"], "prompt": line["text"], "text": "yes"} for line in OWN]
        self.seeds.append(Seeds(find_task(str(own)), own, answers, {}))

    def score(self, seeds: Seeds, path: Path, partial: bool = True) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        root = None if seeds.task.file else str(seeds.root)
        scored = score_file(seeds.task, root, path, self.output, partial, None)
        print_scores(scored, console=self.console)

    def score_trees(self, input: tuple[int, list[Any], str, bool]) -> None:
        number, records, form, partial = input
        path = self.folder / "answers.jsonl"
        if form == "lines":
            path.write_text(join_lines(records))
        elif form == "list":
            path.write_text(json.dumps(records))
        else:
            ids = [record for record in to_list(records) if isinstance(record, dict)]
            path.write_text(json.dumps({str(record.get("question_id")): record.get("text") for record in ids}))
        self.score(self.seeds[number], path, partial)

    def score_bytes(self, input: tuple[int, bytes]) -> None:
        path = self.folder / "answers.jsonl"
        path.write_bytes(input[1])
        self.score(self.seeds[input[0]], path)

    def score_official(self, input: tuple[int, str, bytes]) -> None:
        number, name, content = input
        place = self.folder / "official"
        shutil.rmtree(place, ignore_errors=True)
        files = {**self.seeds[number].official, name: content}
        for each, data in files.items():
            (place / each).parent.mkdir(parents=True, exist_ok=True)
            (place / each).write_bytes(data)
        self.score(self.seeds[number], place if len(files) > 1 else place / name)

    def score_data(self, input: tuple[int, str, bytes]) -> None:
        """Valid answers, but a file of the benchmark's data is changed; it is put back after."""
        number, name, content = input
        seeds, path = self.seeds[number], self.seeds[number].root / name
        if seeds.task.file:
            path = seeds.root
        before = path.read_bytes()
        answers = self.folder / "answers.jsonl"
        answers.write_text("".join(json.dumps(record) + "\n" for record in seeds.answers))
        try:
            path.write_bytes(content)
            self.score(seeds, answers)
        finally:
            path.write_bytes(before)

    def compare(self, input: tuple[str, bytes]) -> None:
        name, content = input
        path = self.folder / "b" / name
        before = path.read_bytes()
        try:
            path.write_bytes(content)
            tasks = [path.parent.name] if path.parent.parent.name == "eval" else None
            for comparison in compare.compare_runs(self.folder / "a", self.folder / "b", tasks):
                comparison.to_sentence("a", "b")
        finally:
            path.write_bytes(before)

    def show(self, content: bytes) -> None:
        path = self.output / RESULTS
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        path.write_bytes(content)
        answers = self.folder / "answers.jsonl"
        answers.write_text("".join(json.dumps(record) + "\n" for record in self.seeds[-1].answers))
        score_file(self.seeds[-1].task, None, answers, self.output, False, None)

    def resume(self, input: tuple[bytes, bytes, bytes]) -> None:
        place = self.folder / "resumed"
        shutil.rmtree(place, ignore_errors=True)
        for name, content in zip(("answers.jsonl", "answers.part-0.jsonl", "made_with.json"), input, strict=True):
            place.mkdir(exist_ok=True)
            (place / name).write_bytes(content)
        join_process_files(place / "answers.jsonl")
        read_answers(place / "answers.jsonl")
        claim_folder(place, {"model": "x"})

    def make_runs(self) -> list[str]:
        """Two scored runs of all tasks, a and b; returns the files that a comparison reads."""
        for run in ("a", "b"):
            for seeds in self.seeds:
                path = self.folder / "answers.jsonl"
                lines = [{**record, "text": "no"} if run == "b" else record for record in seeds.answers[::-1]]
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
                root = None if seeds.task.file else str(seeds.root)
                if seeds.task.name not in ("mmvet",):  # a judge grades it
                    score_file(seeds.task, root, path, self.folder / run, True, None)
        place = self.folder / "b"
        return sorted(str(path.relative_to(place)) for path in place.rglob("*.json*") if path.name != "metrics.json")


def build(folder: Path) -> list[Case]:
    place = Folder(folder)
    values = make_values(KEYS)

    def pick(number: int) -> st.SearchStrategy[Any]:
        forms = st.sampled_from(["lines", "lines", "list", "object"])
        return st.tuples(st.just(number), edit_trees([place.seeds[number].answers], values), forms, st.booleans())

    def damage(name: str, content: bytes) -> st.SearchStrategy[tuple[str, bytes]]:
        """A file with changed bytes, or changed values where it holds JSON."""
        return st.tuples(st.just(name), st.one_of(edit_bytes([content]), *edit_json(content, values)))

    def damage_data(number: int) -> st.SearchStrategy[Any]:
        root = place.seeds[number].root
        paths = [root] if root.is_file() else [path for path in sorted(root.rglob("*")) if is_data(path)]
        each = [damage("" if root.is_file() else str(path.relative_to(root)), path.read_bytes()) for path in paths]
        return st.one_of(each).map(lambda pair: (number, *pair))

    def damage_official(number: int) -> st.SearchStrategy[Any]:
        official = place.seeds[number].official
        return st.one_of([damage(*item) for item in official.items()]).map(lambda pair: (number, *pair))

    numbers = range(len(place.seeds))
    texts = [b"".join(json.dumps(line).encode() + b"\n" for line in seeds.answers) for seeds in place.seeds]
    files = place.make_runs()
    whole = (folder / "a" / RESULTS).read_bytes()
    made = [b'{"model": "x", "decoding": {}}', b"{}", b"[]"]
    kept = edit_bytes([b'{"id": "1", "text": "a"}\n{"id": "2", "text": "b"}\n', b""])
    return [
        Case("answers: records", st.one_of([pick(number) for number in numbers]), place.score_trees),
        Case(
            "answers: bytes",
            st.one_of([st.tuples(st.just(n), edit_bytes([texts[n]])) for n in numbers]),
            place.score_bytes,
        ),
        Case(
            "answers: official",
            st.one_of([damage_official(n) for n in numbers if place.seeds[n].official]),
            place.score_official,
        ),
        Case("answers: data", st.one_of([damage_data(number) for number in numbers]), place.score_data),
        Case(
            "answers: compare",
            st.one_of([damage(name, (folder / "b" / name).read_bytes()) for name in files]),
            place.compare,
        ),
        Case("answers: results", damage("", whole).map(lambda pair: pair[1]), place.show),
        Case("answers: resume", st.tuples(kept, kept, edit_bytes(made)), place.resume),
    ]


def to_list(tree: Any) -> list[Any]:
    return tree if isinstance(tree, list) else [tree]


def join_lines(tree: Any) -> str:
    return "".join(json.dumps(line) + "\n" for line in to_list(tree))


def is_data(path: Path) -> bool:
    """Whether a file of a fixture is one that the benchmark reads."""
    return path.is_file() and not {"answers", "expected.json"} & set(path.parts) and "expected" not in path.name


def edit_json(content: bytes, values: st.SearchStrategy[Any]) -> list[st.SearchStrategy[bytes]]:
    """A strategy that changes the values in a JSON document or in JSON lines; [] for anything else."""
    try:
        document = json.loads(content)
        return [edit_trees([document], values).map(lambda tree: json.dumps(tree).encode())]
    except ValueError:
        pass
    try:
        lines = [json.loads(line) for line in content.splitlines() if line.strip()]
    except ValueError:
        return []
    return [edit_trees([lines], values).map(lambda tree: join_lines(tree).encode())]
