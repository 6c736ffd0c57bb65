"""Let a language model grade answers, behind any OpenAI-compatible URL: `--judge MODEL`, for MM-Vet.

    OPENAI_BASE_URL   the server's URL; default: https://api.openai.com/v1
    OPENAI_API_KEY    its key; your own server may not require one

This requires the `openai` package: pip install "tinyllava-factory[judge]". A request is repeated, with growing pauses,
after a rate limit, a server error, a broken connection, or a reply that is not a completion. If the last try fails too,
it is an error and never a grade. The grades until then are kept: run the same command again to resume.
"""

import logging
import os
import random
import time
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks._judge import JUDGE_MAX_TOKENS
from tinyllava.eval.tasks import Task
from tinyllava.files import parse_json
from tinyllava.secrets import hide_secrets

logger = logging.getLogger("tinyllava")

URL = "https://api.openai.com/v1"
TRIES = 8
PAUSE = 1.0  # seconds before the second try, doubled before each further one
LONGEST_PAUSE = 60.0
TIMEOUT = 120.0
TRANSIENT = (408, 409, 425, 429)  # HTTP status codes, besides 5xx, after which the same request may succeed


def set_judge(task: Task, judge: str | None, folder: Path) -> Task:
    """The task with its judge: a model's name, or a file of grades. A model's grades are kept in `folder`.

    Returns the task unchanged if it needs no judge. Raises UserError if the file, key or package is missing.
    """
    if judge is None or not task.benchmark.is_judged:
        return task
    if judge.endswith((".json", ".jsonl")):
        if not Path(judge).is_file():
            raise UserError(f"there is no file of grades {judge}. --judge takes a file, or the name of a model.")
        return task.set_options(grades=Path(judge))
    endpoint = Endpoint(judge)
    return task.set_options(grades=folder / "grades.jsonl", ask=endpoint, model=endpoint.name)


class Endpoint:
    """A chat model behind a URL: `Endpoint("gpt-4-0613")(prompt, temperature)` returns its reply."""

    def __init__(self, model: str, url: str | None = None, key: str | None = None) -> None:
        """Prepare the client. `url` and `key`: default from the environment. Raises UserError if one is missing."""
        self.model = model
        self.url = (url or os.environ.get("OPENAI_BASE_URL") or URL).rstrip("/")
        key = key or os.environ.get("OPENAI_API_KEY")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"the judge's URL must begin with http:// or https://; found {self.url!r}.")
        if key is None and self.url == URL:
            raise UserError("the judge needs a key: set OPENAI_API_KEY, or OPENAI_BASE_URL to a server of your own.")
        try:
            from openai import OpenAI
        except ImportError:
            raise UserError('--judge MODEL requires openai: pip install "tinyllava-factory[judge]"') from None
        # The client's own retries are off: they do not repeat a request whose reply is not a completion, and they stop
        # at once if Retry-After asks for more than two minutes. The client needs a key even for a server without keys.
        self.client = OpenAI(base_url=self.url, api_key=key or "none", timeout=TIMEOUT, max_retries=0)

    @property
    def name(self) -> str:
        """The name in result files: the model, and its URL unless that is OpenAI's."""
        return self.model if self.url == URL else f"{self.model} at {hide_secrets(self.url)}"

    def __call__(self, prompt: str, temperature: float) -> str | None:
        """Send one user message and return the text of the reply, which has at most three tokens (MM-Vet's rule).

        Raises UserError at once if the server refuses the request, and after TRIES failures.
        """
        from openai import APIConnectionError, APIStatusError

        for attempt in range(1, TRIES + 1):
            # Random, so that several clients that failed together do not try again together.
            pause = min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            try:
                return self._request(prompt, temperature)
            except APIStatusError as error:
                reason = f"HTTP {error.status_code} {error.response.reason_phrase}: {_read_message(error.body)}"
                if error.status_code not in TRANSIENT and error.status_code < 500:
                    raise UserError(f"the judge at {self.url} refuses {self.model}: {reason}") from None
                pause = max(pause, _read_retry_after(error.response.headers.get("Retry-After")))
            except APIConnectionError as error:  # no connection, a lost connection, or a time-out
                reason = str(error.__cause__ or error) or type(error.__cause__).__name__
            except ValueError as error:
                reason = f"the reply is not a chat completion: {error}"
            if attempt < TRIES:
                logger.info("the judge failed (%s); next try in %.0f s", reason, pause)
                time.sleep(pause)
        raise UserError(
            f"the judge at {self.url} failed {TRIES} times, the last time with: {reason}\n"
            "The grades until now are kept: run the same command again to resume."
        )

    def _request(self, prompt: str, temperature: float) -> str | None:
        # The raw reply: the client parses a missing text as None, which MM-Vet would grade with 0.
        reply = self.client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=[{"role": "user", "content": prompt}],
            temperature=temperature,
            max_tokens=JUDGE_MAX_TOKENS,
        )
        return _read_text(reply.content)


def _read_text(reply: bytes) -> str | None:
    """The text of a chat completion, which may be null. Raises ValueError for anything else."""
    try:
        text = parse_json(reply)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = ...
    if not isinstance(text, str | None):
        raise ValueError(f"{reply[:200]!r}")
    return text


def _read_message(body: Any) -> str:
    """The server's message in an error. `body` is the reply's `error` field, or the whole reply if it has none."""
    message = body.get("message", body) if isinstance(body, dict) else body
    return str(message or "(no message)")[:200].strip()


def _read_retry_after(value: str | None) -> float:
    """The seconds in a Retry-After header, at most LONGEST_PAUSE; 0 without the header."""
    try:
        return min(float(value or 0), LONGEST_PAUSE)
    except ValueError:  # the header may also hold a date
        return 0.0
