"""One process shows what several would say, and torchrun's summary repeats it."""

import errno
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tinyllava.console import messages, show_error
from tinyllava.failures import LOST_MESSAGE, describe_failure


@pytest.fixture
def ranks(tmp_path: Path) -> list[Path]:
    """Where torchrun reads the errors of two processes of its first attempt."""
    files = [tmp_path / "attempt_0" / str(rank) / "error.json" for rank in range(2)]
    for file in files:
        file.parent.mkdir(parents=True)
    return files


def show_from(rank: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(rank))
    with messages.capture() as shown:
        show_error(text)
    return shown.get()


def test_the_same_error_is_shown_once_and_another_too(ranks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [show_from(rank, text, monkeypatch) for text in ("no such file", "no such key") for rank in ranks]
    assert [text.strip() for text in shown] == ["error: no such file", "", "error: no such key", ""]
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    for _ in range(2):  # a process alone, such as a chat, says it each time
        with messages.capture() as shown:
            show_error("no such file")
        assert "no such file" in shown.get()


def test_torchrun_names_the_cause(ranks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    show_from(ranks[1], "sample i7 is damaged", monkeypatch)
    show_from(ranks[0], LOST_MESSAGE, monkeypatch)  # it failed because of the other
    failures = {rank: ProcessFailure(rank, 1, 2, str(file)) for rank, file in enumerate(ranks)}
    summary = str(ChildFailedError("train", failures))
    cause = summary[summary.index("Root Cause") :]
    assert "rank      : 1 " in cause and "traceback : sample i7 is damaged" in cause


def test_an_error_is_shown_where_the_directory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "damaged" in show_from(tmp_path / "gone" / "0" / "error.json", "sample i7 is damaged", monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [::1]:534: Connection reset by peer",
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation",
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error",
    ],
)
def test_a_lost_process_is_told_from_a_fault(text: str) -> None:
    assert describe_failure(RuntimeError(text)) == LOST_MESSAGE
    assert describe_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert describe_failure(OSError(errno.EBADF, "Bad file descriptor")) is None
