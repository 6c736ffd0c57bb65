"""The contract of a benchmark: one `class Benchmark` in one file here, and THE FILE NAME IS THE KEY.

    class Benchmark(benchmarks.Benchmark):      # in pope.py: `--tasks pope`
        title = "POPE"                          # its name in tables; `scorer` names the rules and their version
        questions(root) -> list[Question]       # what to ask
        parse(text, question)                   # the parsed answer; None if it cannot be read
        score(text, question) -> float          # 0..1

This is enough if the score is the percentage of right answers. A benchmark with another score defines `evaluate`. The
official rules are pure functions beside the class, so that tests can compare them with the official scorers.
`--tasks my_package.my_module:MyBenchmark` runs a benchmark from outside the package (docs/add-your-own-benchmark.md).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, ClassVar, NamedTuple

from tinyllava.errors import UserError

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."

Root = str | Path  # the value of --data
Answer = dict[str, Any]  # a record of an answers file: question_id, text and, in our and LLaVA's files, prompt
ScoredItem = dict[str, Any]  # a scored answer, as `build_item` returns it
Sums = dict[str, float]  # named sums over scored items, from which a score can be computed


@dataclass(frozen=True)
class Question:
    """One question, with everything that is needed to ask it and to score its answer."""

    id: str  # unique within the benchmark
    question_id: str | int  # the id in the release and in answers files, where it may repeat
    text: str = ""  # the prompt, without the image's placeholder; "" when the data files have no prompts
    images: tuple[str, ...] = ()  # paths
    answer: Any = None  # the right answer, in the release's form; None if it is not published
    category: str = ""
    options: tuple[str, ...] = ()
    required: bool = True  # False: an answer is used if there is one, but it may be missing
    extra: dict[str, Any] = field(default_factory=dict)  # further fields for this benchmark's scorer


Pair = tuple[Question, Answer | None]  # None: the answer is missing


class OfficialAnswers(NamedTuple):
    """The answers of a file in the form of a benchmark's own tool, with the ids of our questions."""

    records: list[Answer]
    questions: list[Question]  # those that the file is for: POPE's tool takes one category a file


@dataclass
class Benchmark:
    """A benchmark. Its options are dataclass fields, and the name of a variant sets some of them."""

    # For tables and result files.
    title: ClassVar[str]  # such as "POPE"
    scorer: ClassVar[str]  # the source and version of the rules; scores of two scorers are never compared
    metric: ClassVar[str] = "accuracy"  # the name of the score, if `evaluate` is not overridden

    # For asking.
    folder: ClassVar[str] = ""  # its folder in the data root
    max_new_tokens: ClassVar[int] = 128  # of greedy decoding; the published benchmarks have that of LLaVA's scripts
    variants: ClassVar[dict[str, dict[str, Any]]] = {}  # {"no-ocr": {"ocr": False}}: TASK-no-ocr sets these options

    # What is special about a benchmark. The defaults are right for most.
    needs_root: ClassVar[bool] = True  # True: it cannot run without --data ROOT
    asks_blind: ClassVar[bool] = False  # True: every run also asks without the images (the blind baseline)
    fills_categories: ClassVar[bool] = False  # True: its categories are also those of the whole results.json
    is_judged: ClassVar[bool] = False  # True: a language model grades answers; requires the options grades, ask, model
    has_options: ClassVar[bool] = False  # True: TASK-likelihood takes the likeliest option; requires `choose_from`
    counts_duplicates: ClassVar[bool] = False  # True: each answer to a question counts; False: only the last one
    is_mean: ClassVar[bool] = True  # False: the score is not the mean of the items; requires `tally` and `headline`

    @classmethod
    def from_short_name(cls, name: str) -> dict[str, Any] | None:
        """The options of the variant in a name such as textvqa-test-no-ocr; None if the name has no variant.

        The UserError for an unknown variant lists the known ones.
        """
        key, _, rest = name.partition("-")
        options: dict[str, Any] = {}
        while rest and cls.variants:
            # The longest match: "test-dev" is not "test" and then "dev".
            word = max((known for known in cls.variants if f"{rest}-".startswith(f"{known}-")), key=len, default=None)
            if word is None:
                raise UserError(f"{key} has no variant '{rest}'. Known: {', '.join(cls.variants)}.")
            options |= cls.variants[word]
            rest = rest[len(word) + 1 :]
        return options or None

    def locate(self, root: Root | None, trained_on: Iterable[str] = ()) -> Root:
        """Find the data; returns the `root` for the methods below. `root`: the value of --data, or None.

        `trained_on`: the data that the model was trained on. Raises UserError if the data cannot be found.
        """
        return root or "."

    def questions(self, root: Root) -> list[Question]:
        """The questions to ask. The UserError for missing files names the expected ones."""
        raise NotImplementedError

    def references(self, root: Root) -> list[Question]:
        """The questions for scoring an answers file. Their prompts may be empty."""
        return self.questions(root)

    def choose_from(self, question: Question) -> tuple[str, ...]:
        """The options that TASK-likelihood chooses from; () if the answer must be generated."""
        return ()

    def key(self, record: Answer) -> str:
        """The key that matches an answer to its question. `record` has the question_id and prompt of either."""
        return str(record["question_id"])

    def read_official(self, path: Path, questions: list[Question]) -> OfficialAnswers | None:
        """The answers in `path`, a file or a folder in the form of the official tool; None if it has another form.

        JSON lines or a list of records with an id and a text, and an object id -> answer, need no method.
        """
        return None

    def parse(self, text: str, question: Question) -> Any:
        """The parsed answer; None if it cannot be read."""
        return text.strip()

    def score(self, text: str, question: Question) -> float:
        """An answer's score, 0..1."""
        return float(self.parse(text, question) == question.answer)

    def score_answered(self, pairs: list[Pair]) -> list[ScoredItem]:
        """Score each answer by `parse` and `score`; returns its items. Missing answers are left out."""
        return [
            build_item(
                question,
                record["text"],
                self.parse(record["text"], question),
                None if question.answer is None else self.score(record["text"], question),
            )
            for question, record in drop_missing(pairs)
        ]

    def evaluate(self, root: Root, pairs: list[Pair]) -> dict[str, Any]:
        """The result of all answers, as `build_result` returns it. By default the mean score in percent."""
        return self.average_items(self.score_answered(pairs))

    def average_items(self, items: list[ScoredItem]) -> dict[str, Any]:
        """The result whose score is the mean of the items' scores in percent."""
        unparsed = sum(item["parsed"] is None for item in items)
        if any(item["score"] is None for item in items):
            return build_result(None, "no right answers to score by", {}, items, unparsed)
        metrics = {"per_category": average_categories(items)}
        return build_result(100 * average(item["score"] for item in items), self.metric, metrics, items, unparsed)

    def tally(self, item: ScoredItem) -> Sums:
        """The sums of one item. `headline` computes the score from the sums over all items."""
        return {"score": item["score"], "n": 1}

    def headline(self, sums: Sums) -> float:
        """The score, from sums over all items or over resampled ones (for intervals); 0 if there are none."""
        return 100 * sums["score"] / sums["n"] if sums.get("n") else 0.0


def build_item(
    question: Question, answer: str | None, parsed: Any, score: float | None, /, **more: Any
) -> dict[str, Any]:
    """Build one line of items.jsonl. `score` is in 0..1, or None if only a server knows the right answer."""
    return {
        "id": question.id,
        "image": _name_image(question.images[0]) if question.images else "",
        "answer": answer,
        "parsed": parsed,
        "gold": question.answer,
        "score": score,
        "category": question.category,
        **more,
    }


def _name_image(image: str) -> str:
    """The path or URL of an image, or a hash in place of its content."""
    return f"data:{hashlib.sha256(image.encode()).hexdigest()[:16]}" if image.startswith("data:") else image


def build_result(
    score: float | None,
    metric: str,
    metrics: dict[str, Any],
    items: list[ScoredItem],
    unparsed: int = 0,
    files: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Build what `evaluate` returns.

    score: the number in published tables, in their scale; None if only a server can compute it.
    metric: the name of that number. metrics: everything the official scorer reports, with its names and scales.
    items: one for each scored answer. unparsed: the number of answers that the official parser could not read.
    files: for servers and official tools: name -> text, or a value that json.dump can write.
    """
    return {
        "score": score,
        "metric": metric,
        "metrics": metrics,
        "items": items,
        "unparsed": unparsed,
        "files": files or {},
    }


def to_answer_fields(question: Question) -> dict[str, Any]:
    """The fields that identify the question in an answers file."""
    return {"question_id": question.question_id, "prompt": question.text}


def hash_questions(questions: Iterable[Question]) -> str:
    """A hash of the ids, file names of images and right answers of the questions, in any order."""
    facts = sorted((q.id, [PurePath(image).name for image in q.images], repr(q.answer)) for q in questions)
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def average(values: Iterable[float]) -> float:
    """The arithmetic mean; 0 if there are no values."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def average_categories(items: Iterable[ScoredItem]) -> dict[str, dict[str, float]]:
    """{accuracy, n} of each category, in the order of the test."""
    return {
        name: {"accuracy": average(item["score"] for item in group), "n": len(group)}
        for name, group in group_items(items, "category").items()
    }


def group_items(items: Iterable[ScoredItem], name: str) -> dict[str, list[ScoredItem]]:
    """Group the items by their field `name`, in the order of the items."""
    groups: dict[str, list[ScoredItem]] = {}
    for item in items:
        groups.setdefault(item[name], []).append(item)
    return groups


def drop_missing(pairs: Iterable[Pair]) -> list[tuple[Question, Answer]]:
    """The pairs that have an answer."""
    return [(question, record) for question, record in pairs if record is not None]
