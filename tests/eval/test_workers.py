"""Several processes and kills give the same answers as one process without a kill: none is lost, none occurs twice."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_session import tiny_session
from tinyllava import checkpoint
from tinyllava.eval.answers import join_process_files, name_process_file, read_answers
from tinyllava.eval.ask import split_chunks
from tinyllava.eval.benchmarks import Question
from tinyllava.eval.workers import Workers

KILLS = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with checkpoint/ and questions.jsonl: 20 pictures with six questions each."""
    folder = tmp_path_factory.mktemp("place")
    made = tiny_session()
    checkpoint.save(made.vlm, folder / "checkpoint")
    rng, records = np.random.default_rng(0), []
    for number in range(20):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        for at in range(6):
            one = {"question_id": f"{number}-{at}", "image": f"{number}.png", "text": f"What is in the picture? {at}"}
            records.append({**one, "answer": "yes"})
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def arguments(place: Path, output: Path) -> list[str]:
    """`tinyllava eval`."""
    return ["eval", str(place / "checkpoint"), "--tasks", str(place / "questions.jsonl"), "--output", str(output)]


def lines(output: Path) -> list[bytes]:
    return sorted((output / "eval/questions/answers.jsonl").read_bytes().splitlines())


def command(words: list[str], environment: dict[str, str]) -> None:
    """Run the console script with small batches, so that there is time between the first answer and the last."""
    from tinyllava import cli
    from tinyllava.infer import prompts

    prompts.ROWS = 6
    os.environ |= environment
    cli.main(words)


def start(words: list[str], **environment: str) -> BaseProcess:
    """Start `tinyllava` in a separate process.

    It is forked from a process that has imported everything, because importing torch takes longer than the rest.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tinyllava.eval.run", "tinyllava.commands.evaluate", "tinyllava.cli"])
    process = context.Process(target=command, args=(words, environment))
    process.start()
    return process


@pytest.fixture(scope="module")
def undisturbed(place) -> list[bytes]:
    """The answers of one process that is not killed."""
    process = start(arguments(place, place / "undisturbed"))
    process.join()
    assert process.exitcode == 0
    return lines(place / "undisturbed")


def test_ten_kills_change_no_answer(place, undisturbed, tmp_path) -> None:
    path, rng = tmp_path / "eval/questions/answers.jsonl", random.Random(0)
    end = sum(map(len, undisturbed))
    sizes = []
    for kill in range(KILLS):
        process = start(arguments(place, tmp_path))
        while (path.stat().st_size if path.is_file() else 0) < kill * end * rng.uniform(0.8, 1) / KILLS:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))  # or, the first time, before there is anything
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        sizes.append(path.stat().st_size if path.is_file() else 0)
    assert sizes == sorted(sizes) and len({*sizes}) >= 7 and sizes[-1] < end
    last = start(arguments(place, tmp_path))
    last.join()
    assert last.exitcode == 0
    assert lines(tmp_path) == undisturbed
    mine, other = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, place / "undisturbed"))
    assert mine["tasks"] == other["tasks"]


def test_torchrun_gives_the_answers_of_one_process(place, undisturbed, tmp_path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launcher, "-m", "tinyllava", *arguments(place, tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sample answers with their images") == 1  # the first process speaks
    assert lines(tmp_path) == undisturbed
    assert not list((tmp_path / "eval/questions").glob("*.part-*"))


def test_no_answer_is_lost_when_one_of_two_processes_is_killed(place, undisturbed, tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [start(arguments(place, tmp_path), RANK=str(rank), **shared) for rank in range(2)]
    parts = [tmp_path / f"eval/questions/answers.part-{rank}.jsonl" for rank in range(2)]
    while not all(part.is_file() and part.stat().st_size for part in parts):
        assert all(process.is_alive() for process in both)
        time.sleep(0.001)
    for process in reversed(both):  # torchrun ends the others when one dies
        process.kill()
        process.join()
    left = sum(len(read_answers(part)) for part in parts)
    assert 2 <= left < len(undisturbed)
    last = start(arguments(place, tmp_path))
    last.join()
    assert last.exitcode == 0 and lines(tmp_path) == undisturbed
    assert not any(part.exists() for part in parts)


def test_files_of_killed_processes_are_joined_once(tmp_path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": "1", "text": "a"}\n{"id": "2", "te')
    name_process_file(path, 0).write_text(
        '{"id": "1", "text": "a"}\n{"id": "3", "text": "c"}\n'
    )  # killed before it was removed
    name_process_file(path, 11).write_text('{"id": "2", "text": "b"}\n{"id": "4", "text"')
    join_process_files(path)
    assert list(read_answers(path)) == ["1", "3", "2"]
    assert path.read_text().count("\n") == 3 and list(tmp_path.iterdir()) == [path]


class Store(dict):
    """A store like torchrun's, for one process."""

    def add(self, name: str, number: int) -> int:
        self[name] = self.get(name, 0) + number
        return self[name]


@pytest.mark.parametrize("count", [2, 7])
def test_chunks_are_taken_once_and_keep_images_together(count: int) -> None:
    questions = [Question(str(at), at, images=(f"{at % 31}.png",) if at % 4 else ()) for at in range(200)]
    store, rng = Store(), random.Random(0)
    made = split_chunks(questions, count)
    assert len(made) >= 4 * count
    takers = [Workers(rank, count, store).take("x", made) for rank in range(count)]
    taken = []
    while takers:
        taker = rng.choice(takers)
        chunk = next(taker, None)
        takers.remove(taker) if chunk is None else taken.append(chunk)
    assert sorted(q.question_id for chunk in taken for q in chunk) == list(range(200))
    shown = [{q.images for q in chunk if q.images} for chunk in taken]
    assert sum(map(len, shown)) == len(set().union(*shown))
    assert [len(chunk) for chunk in split_chunks(questions, 1)] == [200]
