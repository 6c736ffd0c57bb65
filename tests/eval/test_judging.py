"""A judge over HTTP that fails: each request is repeated, no failure becomes a grade, and a kill loses nothing.

The server is a real one on this machine. Only the pauses are shortened.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from oracle_tools import copy_of, with_preamble

from tests.cli_tools import assert_refused, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tinyllava.errors import UserError
from tinyllava.eval import judging
from tinyllava.eval.benchmarks import _judge
from tinyllava.eval.judging import Endpoint

GRADE = {"choices": [{"message": {"role": "assistant", "content": "0.5"}}]}


class Judge(ThreadingHTTPServer):
    """Answer requests with `behaviours` in turn, and then grade everything with 0.5."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviours: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: object, client: object) -> None:
        """A client that closed the connection is not an error of this server."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        time.sleep(self.server.delay)
        if self.server.behaviours:
            self.server.behaviours.pop(0)(self)
            return
        self.server.asked.append(asked)
        self.server.keys.append(self.headers.get("Authorization"))
        reply(self, 200, GRADE)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def reply(handler: BaseHTTPRequestHandler, status: int, body: object, **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def fails(status: int, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: reply(handler, status, {"error": {"message": "not now"}}, **headers)


def says(body: object, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: reply(handler, 200, body, **headers)


def resets(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without an answer."""
    handler.connection.close()


def sleeps(handler: BaseHTTPRequestHandler) -> None:
    """Send nothing until the client stops waiting."""
    time.sleep(1.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setattr(judging, "PAUSE", 0.001)
    monkeypatch.setattr(judging, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(judging, "TIMEOUT", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Judge() as one:
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("OPENAI_BASE_URL", one.url)
        monkeypatch.setenv("OPENAI_API_KEY", "a key")
        yield one
        one.shutdown()


MISBEHAVIOUR = {
    "rate limit": fails(429),
    "rate limit with seconds": fails(429, Retry_After="0.01"),
    "rate limit with a date": fails(429, Retry_After="Fri, 31 Dec 2027 23:59:59 GMT"),
    "server error": fails(500),
    "unavailable": fails(503),
    "no JSON": says(b"<html>busy</html>"),
    "no choices": says({"choices": []}),
    "an error that says 200": says({"error": "busy"}),
    "no text": says({"choices": [{"message": {"content": ["0.5"]}}]}),
    "half a reply": says(b'{"choices": [{"mess', Content_Length="1000"),
    "connection reset": resets,
    "too slow": sleeps,
}


@pytest.mark.parametrize("behaviour", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR)
def test_a_request_is_repeated_after_each_kind_of_failure(server: Judge, behaviour: Callable) -> None:
    server.behaviours = [behaviour] * 2
    assert Endpoint("judge")("How good?", 0.5) == "0.5"
    assert server.behaviours == []
    (asked,) = server.asked
    message = {"role": "user", "content": "How good?"}
    assert asked == {"model": "judge", "messages": [message], "temperature": 0.5, "max_tokens": 3}
    assert server.keys == ["Bearer a key"]


def test_the_pause_is_as_long_as_the_server_asks(server: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "LONGEST_PAUSE", 5.0)
    server.behaviours = [fails(429, Retry_After="0.3")]
    start = time.monotonic()
    assert Endpoint("judge")("How good?", 0.0) == "0.5"
    assert time.monotonic() - start >= 0.3


def test_an_own_server_needs_no_key_and_a_judge_requires_its_package(
    server: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert Endpoint("judge")("How good?", 0.0) == "0.5"
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError) as error:
        Endpoint("judge")
    assert str(error.value) == '--judge MODEL requires openai: pip install "tinyllava-factory[judge]"'


def test_an_empty_reply_is_a_reply(server: Judge) -> None:
    server.behaviours = [says({"choices": [{"message": {"content": None}}]})]
    assert Endpoint("judge")("How good?", 0.0) is None


def test_the_last_failure_is_an_error_and_never_a_grade(server: Judge) -> None:
    server.behaviours = [fails(429)] * judging.TRIES
    with pytest.raises(UserError, match=r"failed 8 times, the last time with: HTTP 429 .*not now\n.*the same command"):
        Endpoint("judge")("How good?", 0.0)
    assert server.asked == [] and server.behaviours == []


def test_a_refused_request_is_an_error_at_once(server: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (400, 401, 404):
        server.behaviours = [fails(status)]
        with pytest.raises(UserError, match=f"refuses judge: HTTP {status} .*: not now"):
            Endpoint("judge")("How good?", 0.0)
        assert server.asked == []
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000")
    with pytest.raises(UserError, match=r"must begin with http://.*'localhost:8000'"):
        Endpoint("judge")
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        Endpoint("judge")


def test_mmvet_is_judged_through_the_command_line(server: Judge, tmp_path: Path, monkeypatch, tinyllava) -> None:
    root = copy_of("mmvet", tmp_path)
    with_preamble(root, monkeypatch)
    score = ["score", "mmvet", "--data", tmp_path, "--answers", root / "answers/model.jsonl", "--output", tmp_path]
    server.behaviours = [fails(429), fails(500), says(b"garbage"), resets]
    assert tinyllava(*score, "--judge", "gpt-x").code == 0
    entry = json.loads((tmp_path / "results.json").read_text())["tasks"]["mmvet"]
    assert (entry["score"], entry["unparsed"]) == (50.0, 0)
    assert entry["metric"] == f"MM-Vet, judged by gpt-x at {server.url}"
    count = len(server.asked)
    assert count == entry["n"]
    assert tinyllava(*score, "--judge", "gpt-x").code == 0
    assert len(server.asked) == count  # all grades are kept
    server.behaviours = [says({"choices": [{"message": {"content": "well"}}]})] * 10 * count
    assert tinyllava(*score, "--judge", "gpt-y").code == 0  # another judge: graded anew
    assert json.loads((tmp_path / "results.json").read_text())["tasks"]["mmvet"]["unparsed"] == count
    folder = tmp_path / "eval" / "mmvet"
    for grades in (folder / "mmvet_grades.json", folder / "grades.jsonl"):
        again = tinyllava(*score[:-1], tmp_path / grades.suffix, "--judge", grades)
        assert again.code == 0 and "judged by gpt-y" in again.out
    assert_refused(tinyllava(*score, "--judge", tmp_path / "no.json"), "no.json", "no file of grades")
    assert_refused(tinyllava("score", "pope", "--data", root, "--answers", "x", "--judge", "gpt-x"), "--judge", "mmvet")


def test_judging_resumes_after_a_kill(server: Judge, tmp_path: Path, monkeypatch, tinyllava) -> None:
    root = copy_of("mmvet", tmp_path)
    with_preamble(root, monkeypatch)
    arguments = ["score", "mmvet", "--data", str(tmp_path), "--answers", str(root / "answers/model.jsonl")]
    arguments += ["--output", str(tmp_path / "out"), "--judge", "gpt-x"]
    code = (
        "import sys\nfrom tinyllava import cli\nfrom tinyllava.eval.benchmarks import _judge\n"
        f"_judge.PREAMBLE_SHA256 = {_judge.PREAMBLE_SHA256!r}\ncli.main(sys.argv[1:])"
    )
    server.delay = 0.05
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=os.environ, stderr=subprocess.DEVNULL)
    while len(server.asked) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3 * server.delay)  # what was asked when the kill came is done
    server.delay = 0.0
    kept = (tmp_path / "out/eval/mmvet/grades.jsonl").read_bytes().count(b"\n")
    before = len(server.asked)
    assert tinyllava(*arguments).code == 0
    entry = json.loads((tmp_path / "out/results.json").read_text())["tasks"]["mmvet"]
    assert kept >= 2 and len(server.asked) - before == entry["n"] - kept and entry["score"] == 50.0
