"""A benchmark from outside the package: follow docs/add-your-own-benchmark.md, and check what the contract promises.

tests/test_add_your_own.py also runs the page's commands, after training. Here the figures are checked.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli_tools import assert_refused, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tests.tiny_session import tiny_session
from tinyllava import checkpoint
from tinyllava.config import load_recipe
from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Benchmark, Question, build_item
from tinyllava.eval.score import score_answers
from tinyllava.eval.tasks import find_task

PAGE = (Path(__file__).parents[2] / "docs/add-your-own-benchmark.md").read_text(encoding="utf-8")
DATA = ("--data", "my_colours")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the page's files and a checkpoint, as on the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for text in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        if name := re.match(r"# (\S+\.py)\n", text):
            Path(name[1]).write_text(text, encoding="utf-8")
        else:
            exec(compile(text, "the page", "exec"), {})
    yield tmp_path
    for name in ("my_benchmark", "my-benchmark", "test_my_benchmark"):
        sys.modules.pop(name, None)


def test_the_page_asks_scores_and_compares(desk: Path, tinyllava) -> None:
    checkpoint.save(tiny_session().vlm, desk / "runs/my-benchmark")
    commands = re.findall(r"^tinyllava (eval|score) (.*)$", PAGE, flags=re.M)
    assert [verb for verb, _ in commands] == ["eval", "score"]
    for verb, words in commands:
        said = tinyllava(verb, *words.split())
        assert said.code == 0, said.err
        assert "Colours" in said.out
    results = json.loads((desk / "runs/my-benchmark/results.json").read_text())
    assert list(results["tasks"]) == ["my_benchmark:Colours", "my_benchmark:Colours-likelihood"]
    spoken, chosen = results["tasks"].values()
    assert (spoken["title"], chosen["title"]) == ("Colours", "Colours likelihood") and spoken["n"] == 3
    assert chosen["metric"] == "accuracy, by likelihood" and chosen["unparsed"] == 0
    assert list(spoken["categories"]) == ["blue", "green", "red"] and results["categories"] == {}
    said = tinyllava("eval", "--compare", "runs/my-benchmark", "runs/my-benchmark")
    assert said.code == 0 and said.out.count("do not differ significantly") == 2


def test_its_own_test_passes_and_its_answers_are_scored_by_its_rules(desk: Path) -> None:
    import test_my_benchmark

    test_my_benchmark.test_the_first_colour_counts()
    answers = {"red/0.png": "It is red.", "green/0.png": "Blue", "blue/0.png": "no idea"}
    Path("answers.json").write_text(json.dumps(answers))
    result = score_answers("my_benchmark:Colours", "my_colours", "answers.json")
    assert result["score"] == pytest.approx(100 / 3) and result["unparsed"] == 1
    assert result["metrics"]["per_category"]["red"] == {"accuracy": 1.0, "n": 1}


def test_variants_and_options_are_those_that_the_class_declares(desk: Path, tinyllava) -> None:
    plain, hint = find_task("my_benchmark:Colours"), find_task("my_benchmark:Colours-hint")
    assert (plain.benchmark.hint, hint.benchmark.hint, hint.title) == (False, True, "Colours hint")
    assert "red, green, blue" in hint.benchmark.questions("my_colours")[0].text
    assert plain.set_options(hint=True).benchmark == hint.benchmark
    with pytest.raises(UserError, match=r"has no option 'hnit'\. It takes: hint\."):
        plain.set_options(hnit=True)
    with pytest.raises(UserError, match=r"has no variant 'hnit'\. Known: hint\."):
        find_task("my_benchmark:Colours-hnit")
    assert_refused(tinyllava("score", "my_benchmark:Colour", *DATA, "--answers", "x"), "cannot load benchmark")
    assert_refused(tinyllava("score", "math:sqrt", *DATA, "--answers", "x"), "not a benchmark", "must inherit from")
    assert_refused(tinyllava("score", "my_benchmark:Colours", "--answers", "x"), "requires its data: give --data ROOT.")


def test_a_recipe_names_variants_as_the_command_line_does(desk: Path) -> None:
    shutil.copy("my_benchmark.py", "my-benchmark.py")  # a hyphen in the name of a file begins no variant
    tasks = ["my_benchmark:Colours-hint", "my_benchmark:Colours-hint-likelihood", "my-benchmark:Colours-hint"]
    assert load_recipe("quickstart", [f"eval=[{', '.join(tasks)}]"]).eval == tasks
    assert [find_task(name).title for name in tasks] == ["Colours hint", "Colours hint-likelihood", "Colours hint"]
    with pytest.raises(UserError, match=r"Colours has no variant 'hnit'\. Known: hint\."):
        load_recipe("quickstart", ["eval=[my_benchmark:Colours-hnit]"])
    with open("my_benchmark.py", "a") as file:
        file.write("\n\nclass Plain(Colours):\n    variants: ClassVar = {}\n")
    del sys.modules["my_benchmark"]
    with pytest.raises(UserError, match="has no attribute 'Plain-hint'"):
        find_task("my_benchmark:Plain-hint")
    with pytest.raises(UserError, match="Name a class of your own as module:Class"):
        find_task("my_benchmark")


def test_a_class_that_leaves_out_a_part_of_the_contract_is_an_error(desk: Path, tinyllava) -> None:
    head = "from tinyllava.eval import benchmarks\n\n\nclass Empty(benchmarks.Benchmark):\n    title = 'Empty'\n"
    Path("unfinished.py").write_text(head)
    words = "benchmark unfinished:Empty does not define scorer, questions"
    assert_refused(tinyllava("score", "unfinished:Empty", *DATA, "--answers", "x"), words)


def test_a_directory_without_questions_is_an_error(desk: Path, tinyllava) -> None:
    checkpoint.save(tiny_session().vlm, desk / "model")
    words = "my_benchmark:Colours has no questions: nothing was found in nowhere. Check --data."
    assert_refused(tinyllava("eval", "model", "--tasks", "my_benchmark:Colours", "--data", "nowhere"), words)
    assert_refused(tinyllava("score", "my_benchmark:Colours", "--data", "nowhere", "--answers", "x"), words)


def test_the_defaults_of_the_contract() -> None:
    """The defaults: a mean of equal answers, no variants, nothing special."""

    class Mine(Benchmark):
        title = "Mine"
        scorer = "mine 1"

        def questions(self, root: object) -> list[Question]:
            return [Question("1", 1, "?", answer="yes"), Question("2", 2, "?", answer="no")]

    mine = Mine()
    pairs = [(question, {"text": " yes\n"}) for question in mine.questions(".")]
    result = mine.evaluate(".", [*pairs, (Question("3", 3), None)])
    assert (result["score"], result["metric"], len(result["items"])) == (50.0, "accuracy", 2)
    assert mine.headline({"score": 1.0, "n": 2}) == 50.0 and mine.headline({}) == 0.0
    assert mine.tally(build_item(pairs[0][0], "yes", "yes", 1.0)) == {"score": 1.0, "n": 1}
    assert mine.key({"question_id": 7}) == "7" and mine.choose_from(pairs[0][0]) == ()
    assert Mine.from_short_name("mine-x") is None and mine.references(".") == mine.questions(".")
    withheld = [(Question("1", 1, "?"), {"text": "yes"})]
    assert mine.evaluate(".", withheld)["score"] is None
