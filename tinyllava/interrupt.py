"""Stop at a signal without losing work.

    with catch_signals() as stop:      # a signal raises Interrupted at once ...
        with stop.defer():             # ... but here it is only noted, and the training loop asks `stop.signal`
            ...

The handlers are installed while a run works, and restored after it. Data workers do not stop at a signal that the whole
group of processes gets (a terminal, systemd and Slurm send one to all): the step that runs needs them.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from tinyllava.console import is_main_process
from tinyllava.errors import Interrupted

if TYPE_CHECKING:
    import torch
# The first three are what schedulers send before they stop a job. SIGHUP: the terminal was closed.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)]
RESTART = 75  # EX_TEMPFAIL of sysexits.h: try again later


class StopRequest:
    """Whether a signal asked this process to stop: `signal` is its number, 0 for none."""

    def __init__(self) -> None:
        self.signal = 0
        self.agreed = False
        self.exchanged: torch.Tensor | None = None  # the last exchange between the processes
        self.keys = 0  # how often Ctrl-C was pressed
        self.deferred = False
        self.process = os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler. A second Ctrl-C stops at once, as does any signal outside `defer`."""
        if os.getpid() != self.process:  # a process that was forked from this one
            return
        self.signal = self.signal or number
        self.keys += number == signal.SIGINT
        if self.keys > 1:
            raise KeyboardInterrupt
        if not self.deferred:
            raise self.make_error("what was finished before is saved")
        if is_main_process():
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            hint = " Press Ctrl-C again to stop at once." if number == signal.SIGINT else ""
            with suppress(OSError):  # a logger may be in the middle of a line when the signal arrives
                os.write(2, f"\n{name}: saving at the end of this step.{hint}\n".encode())

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Only note signals in this block. Afterwards, a signal that was noted raises Interrupted."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
        if self.signal:
            raise self.make_error("the stage that was running is finished and saved")

    def agree(self, device: "torch.device") -> bool:
        """Whether a signal arrived here or at another process of the job. All call it together and get the same answer.

        device: that of this process, for the exchange of one number.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return self.signal > 0
        if self.agreed:
            return True
        import torch

        # The answer is that of the exchange before this one: reading this one would wait for the device.
        earlier, self.exchanged = self.exchanged, torch.tensor(self.signal, device=device)
        torch.distributed.all_reduce(self.exchanged, torch.distributed.ReduceOp.MAX)
        if earlier is not None and (arrived := int(earlier)):
            self.signal, self.agreed = arrived, True
        return self.agreed

    def make_error(self, saved: str, can_resume: bool = True) -> Interrupted:
        """The exception for the signal that arrived. saved: what is saved, as a sentence without its full stop."""
        is_key = self.signal == signal.SIGINT
        name = "Ctrl-C" if is_key else signal.Signals(self.signal).name
        code = RESTART if can_resume and not is_key else 128 + self.signal
        return Interrupted(f"stopped by {name}: {saved}.", code)


_current: list[StopRequest] = []  # at most one: the block that installed the handlers


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Install the handlers for this block. A block inside another one, or in a second thread, installs none.

    A signal that is ignored stays ignored, such as SIGHUP under nohup.
    """
    if _current and _current[0].process == os.getpid():
        yield _current[0]
        return
    stop, before = StopRequest(), {}
    if threading.current_thread() is not threading.main_thread():  # only the main thread can have handlers
        yield stop
        return
    _current[:] = [stop]
    for number in SIGNALS:
        if signal.getsignal(number) not in (None, signal.SIG_IGN):
            before[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        _current.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def shield_worker(worker: int) -> None:
    """Make a data worker outlive the signals of SIGNALS, unless its parent sends SIGTERM to end it.

    Called in the worker. torch's own handler ends the worker at any SIGTERM, which is an error in the parent.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # the thread waits for it instead
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
