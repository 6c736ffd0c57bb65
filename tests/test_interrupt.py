"""Signals stop a run without losing work, and the handlers of whoever called it survive."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tinyllava.errors import Interrupted
from tinyllava.interrupt import RESTART, SIGNALS, catch_signals, shield_worker

CODES = {signal.SIGTERM: RESTART, signal.SIGUSR1: RESTART, signal.SIGHUP: RESTART, signal.SIGINT: 130}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_stops_at_once_or_when_the_work_is_done(number: signal.Signals) -> None:
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    with pytest.raises(Interrupted, match=f"stopped by {name}: what was finished before") as error, catch_signals():
        send(number)
    assert error.value.code == CODES[number]
    done = []
    with pytest.raises(Interrupted, match=name) as error, catch_signals() as stop, stop.defer():
        assert not stop.agree(torch.device("cpu"))
        send(number)
        assert stop.agree(torch.device("cpu")) and stop.signal == number
        done.append("the rest of the step")
    assert error.value.code == CODES[number] and done
    assert str(error.value).endswith(".") and len(str(error.value).splitlines()) == 1


def test_a_second_ctrl_c_stops_at_once_but_other_signals_may_repeat() -> None:
    with pytest.raises(KeyboardInterrupt), catch_signals() as stop, stop.defer():
        send(signal.SIGINT)
        send(signal.SIGINT)
        pytest.fail("the work went on")
    with pytest.raises(Interrupted) as error, catch_signals() as stop, stop.defer():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            send(number)
    assert "SIGUSR1" in str(error.value)  # the first


def test_an_error_of_the_work_is_not_replaced_by_the_signal() -> None:
    with pytest.raises(ZeroDivisionError), catch_signals() as stop, stop.defer():
        send(signal.SIGTERM)
        _ = 1 / 0


def test_the_handlers_from_before_are_restored_and_what_is_ignored_stays_ignored() -> None:
    received: list[int] = []

    def handler(number: int, frame: object) -> None:
        received.append(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with catch_signals() as outer, outer.defer():
            with catch_signals() as inner:
                assert inner is outer
            send(signal.SIGHUP)
            assert outer.signal == 0
        send(signal.SIGTERM)
        assert received == [signal.SIGTERM] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with pytest.raises(Interrupted), catch_signals():
            send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == handler and received == [signal.SIGTERM]
    finally:
        for number, value in before.items():
            signal.signal(number, value)


def test_a_thread_installs_no_handlers() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with catch_signals() as stop, stop.defer():
            seen.append((signal.getsignal(signal.SIGTERM), stop.signal))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]


def test_a_script_that_does_not_catch_it_exits_with_its_code() -> None:
    code = "import os, signal; from tinyllava.interrupt import catch_signals\n"
    code += "with catch_signals(): os.kill(os.getpid(), signal.SIGTERM)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (RESTART, "")


class Numbers(Dataset):
    """Items that name the process that read them."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


def test_a_data_worker_outlives_a_signal_to_the_whole_group_and_ends_with_its_loader() -> None:
    # From the handlers of a run, as in training: a forked worker inherits them.
    with pytest.raises(Interrupted), catch_signals() as stop, stop.defer():
        loader = DataLoader(Numbers(), batch_size=2, num_workers=1, worker_init_fn=shield_worker)
        batches = iter(loader)
        worker = int(next(batches)[1][0])
        # Signals whose sender is not the parent: kill(1) is a process of its own.
        for number in SIGNALS:
            subprocess.run(["kill", f"-{int(number)}", str(worker)], check=True)
        indices = [int(index) for batch in batches for index in batch[0]]
        assert indices == list(range(2, 64))
        batches._shutdown_workers()
        assert [process.exitcode for process in batches._workers] == [0]
        send(signal.SIGTERM)


def test_the_parent_can_end_a_worker() -> None:
    loader = DataLoader(Numbers(), batch_size=2, num_workers=1, worker_init_fn=shield_worker)
    batches = iter(loader)
    next(batches)
    (process,) = batches._workers
    process.terminate()
    process.join(60)
    assert process.exitcode == 0
