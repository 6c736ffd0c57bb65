"""Render chat templates. One that came with a checkpoint or a tokenizer is rendered in a process with limits.

A chat template is a program. jinja's sandbox keeps it from files and from Python's internals, but not from loops
without end and from texts of a terabyte, such as `{% set ns.x = ns.x ~ ns.x %}` in a loop. Only the operating system
stops a program in the middle of one operation. The process gets JSON, answers with JSON, and dies at its limits.
Templates of this package, and files that the user names, are rendered directly.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from tinyllava.errors import UserError

SECONDS = 5  # of processor time for one conversation; ordinary ones take a thousandth
MEMORY = 1 << 29  # bytes beyond those of the idle process
OUTPUT = 20_000_000  # characters of one text
BOS = "{{ bos_token }}"  # what data/fit.py writes before a template
END_OF_TURN = re.compile(r'(?<=set end_of_turn = )("[^"]*"|eos_token)')
# What a template can raise besides jinja's own errors: 1 / 0, an unknown file to include, a macro that calls itself.
FAULTS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, OSError, AssertionError)
TRUSTED: set[str] = set()


def trust_template(source: str) -> None:
    """Render this template directly from now on: the user wrote it, or named its file."""
    TRUSTED.add(_normalise(source))


def render_template(conversation: list[dict[str, Any]], source: str, **options: Any) -> tuple[list[str], list[Any]]:
    """What transformers' `render_jinja_template` makes of a conversation: the text, and its `{% generation %}` spans.

    Raises TemplateError if the template fails, and UserError if it exceeds the limits.
    """
    if _normalise(source) in TRUSTED | _read_ours():
        return _render(conversation, source, options)
    answer = _Renderer.ask([conversation, source, options])
    if "line" in answer:
        raise TemplateSyntaxError(answer["error"], answer["line"])
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["texts"], answer["spans"]


def _normalise(source: str) -> str:
    """A template without what fitting it to a tokenizer changes."""
    return END_OF_TURN.sub("eos_token", source.removeprefix(BOS))


@cache
def _read_ours() -> frozenset[str]:
    folder = Path(__file__).parent / "templates"
    return frozenset(_normalise(path.read_text(encoding="utf-8")) for path in folder.rglob("*.jinja"))


def _render(conversation: list[dict[str, Any]], source: str, options: dict[str, Any]) -> tuple[list[str], list[Any]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        return render_jinja_template([conversation], chat_template=source, **options)
    except FAULTS as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from None


class _Renderer:
    """The process that renders. It starts with the first template that needs it, and ends with this process."""

    process: subprocess.Popen | None = None
    lock = threading.Lock()

    @classmethod
    def ask(cls, request: list[Any]) -> dict[str, Any]:
        """Send a request and return the answer. Raises UserError if the process reaches a limit."""
        with cls.lock:
            process = cls.process or cls.start()
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                line = process.stdout.readline()
            except OSError:  # it died
                line = b""
            if line:
                return json.loads(line)
            cls.stop()
        raise UserError(
            f"a chat template was stopped: for one conversation it took more than {SECONDS} seconds, {MEMORY >> 20} MB,"
            f" or {OUTPUT:,} characters. It came with a checkpoint or a tokenizer. Name another template."
        )

    @classmethod
    def start(cls) -> subprocess.Popen:
        """Start the process."""
        command = [sys.executable, "-c", f"from {__name__} import serve_templates; serve_templates({SECONDS})"]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        where = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        cls.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, bufsize=0, **where)
        cls.process.stdout = os.fdopen(os.dup(cls.process.stdout.fileno()), "rb")  # buffered: it reads whole lines
        return cls.process

    @classmethod
    def stop(cls) -> None:
        """End the process. The next request starts another one."""
        if cls.process is not None:
            cls.process.kill()
            cls.process.communicate()
        cls.process = None

    @classmethod
    def forget(cls) -> None:
        """In a forked process: the process belongs to the parent."""
        cls.process, cls.lock = None, threading.Lock()


os.register_at_fork(after_in_child=_Renderer.forget)


def serve_templates(seconds: float) -> None:
    """Answer the requests of stdin, one a line, until it ends. The process that `_Renderer` starts runs this."""
    from transformers.utils import chat_template_utils  # noqa: F401  (before the limits)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes stdin
    _limit_memory()
    for line in sys.stdin.buffer:
        # The signal's default action ends the process, even in the middle of an operation.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            texts, spans = _render(*json.loads(line))
            answer = json.dumps({"texts": texts, "spans": spans})
            if len(answer) > OUTPUT:
                return
        except TemplateSyntaxError as error:
            answer = json.dumps({"error": error.message, "line": error.lineno})
        except TemplateError as error:
            answer = json.dumps({"error": str(error)[:500]})
        except MemoryError:
            return
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _limit_memory() -> None:
    with suppress(ImportError, OSError, ValueError):  # other systems than Linux count differently, or not at all
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it has no file to write
