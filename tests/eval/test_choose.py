"""Choice by likelihood: the likeliest option is scored by the official rules. It has a result of its own."""

import json

import pytest
from oracle_tools import copy_of, write_mmmu

from tests.eval.test_run import make_pictures
from tests.tiny_session import tiny_session
from tinyllava import checkpoint
from tinyllava.errors import UserError
from tinyllava.eval.ask import to_sample
from tinyllava.eval.run import evaluate_tasks
from tinyllava.eval.score import score_answers
from tinyllava.eval.tasks import find_task
from tinyllava.infer import Session


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    made, folder = tiny_session(), tmp_path_factory.mktemp("model") / "checkpoint"
    checkpoint.save(made.vlm, folder)
    return Session.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "result"),
    [("scienceqa-likelihood", "ABCDE"), ("mmmu-likelihood", "ABCDEFGHI"), ("pope-likelihood-per-token", ("Yes", "No"))],
)
def test_the_likeliest_option_is_the_answer(name: str, result: str, session: Session, tmp_path) -> None:
    task = find_task(name)
    root = copy_of(name.partition("-")[0], tmp_path)
    if name.startswith("mmmu"):
        write_mmmu(root)
    asked = task.benchmark.questions(tmp_path)
    make_pictures(asked)
    entry = evaluate_tasks(session, [name], tmp_path, tmp_path / "out", progress=False)["tasks"][name]
    how = "likelihood per token" if name.endswith("per-token") else "likelihood"
    assert entry["metric"].endswith(f", by {how}") and entry["decoding"]["options"] == how
    answers = tmp_path / "out/eval" / name / "answers.jsonl"
    records = {record["id"]: record["text"] for record in map(json.loads, answers.read_text().splitlines())}
    assert len(records) == len(asked)
    closed = [question for question in asked if task.choice.list_options(question)]
    assert len(closed) >= len(asked) // 2 and (len(closed) < len(asked)) == name.startswith("mmmu")
    options = [task.choice.list_options(question) for question in closed]
    actual = session.loglikelihood([to_sample(question) for question in closed], options)
    for question, own, scores in zip(closed, options, actual, strict=True):
        score = dict(zip(own, [one.per_token if how.endswith("token") else one.total for one in scores], strict=True))
        assert records[question.id] in result and score[records[question.id]] == pytest.approx(max(score.values()))
    again = score_answers(name.partition("-likelihood")[0], tmp_path, answers)
    assert again["score"] == entry["score"]  # by the official rules


def test_a_benchmark_without_options_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"gqa-likelihood: GQA has no options to choose from"):
        find_task("gqa-likelihood")
    with pytest.raises(UserError, match="scienceqa has no variant 'unlikelihood'"):
        find_task("scienceqa-unlikelihood")
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps({"question_id": 1, "text": "?", "answer": "a", "options": ["a", "b"]}) + "\n")
    task = find_task(f"{path}-likelihood-per-token")
    assert task.name == "my-likelihood-per-token" and task.choice.list_options(task.benchmark.questions(path)[0]) == (
        "a",
        "b",
    )
