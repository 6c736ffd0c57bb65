"""A language model that grades answers, behind any OpenAI-compatible URL: `--judge MODEL`, for MM-Vet.

    OPENAI_BASE_URL   where it answers; by default https://api.openai.com/v1
    OPENAI_API_KEY    its key; a server of your own may need none

Rate limits, server errors, broken connections and replies that are no completion are tried again, longer and longer
apart; after the last try it is an error, never a grade. What was graded until then stays: the same command goes on.
"""

import http.client
import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.eval.tasks import Task

logger = logging.getLogger("tinyllava")

URL = "https://api.openai.com/v1"
MAX_TOKENS = 3  # of MM-Vet's judge
TRIES = 8
PAUSE = 1.0  # seconds before the second try, doubled before each further one
LONGEST_PAUSE = 60.0
TIMEOUT = 120.0
AGAIN = (408, 409, 425, 429)  # HTTP states beside 5xx after which the same request may succeed


def judging(task: Task, judge: str | None, folder: Path) -> dict[str, Any]:
    """The options of the task's `evaluate`: `judge` is a model's name, or a file of grades; {} when nobody grades.

    The model's grades are kept in `folder`.
    """
    if judge is None or not task.is_judged():
        return {}
    if judge.endswith((".json", ".jsonl")):
        if not Path(judge).is_file():
            raise UserError(f"there is no file of grades {judge}. --judge takes one, or the name of a model.")
        return {"grades": Path(judge)}
    endpoint = Endpoint(judge)
    return {"grades": folder / "grades.jsonl", "ask": endpoint, "model": endpoint.name}


class Endpoint:
    """A chat model behind a URL: `Endpoint("gpt-4-0613")(prompt, temperature)` is its reply."""

    def __init__(self, model: str, url: str | None = None, key: str | None = None) -> None:
        """`url` and `key` are by default those of the environment."""
        self.model = model
        self.url = (url or os.environ.get("OPENAI_BASE_URL") or URL).rstrip("/")
        self.key = key or os.environ.get("OPENAI_API_KEY")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"the judge's URL must begin with http:// or https://, and is {self.url!r}.")
        if self.key is None and self.url == URL:
            raise UserError("the judge needs a key: set OPENAI_API_KEY, or OPENAI_BASE_URL to a server of your own.")

    @property
    def name(self) -> str:
        """What results call it: the model, and where it runs unless that is OpenAI."""
        return self.model if self.url == URL else f"{self.model} at {self.url}"

    def __call__(self, prompt: str, temperature: float) -> str | None:
        """The reply's text, as MM-Vet asks: one user message, three tokens. UserError when there is none to be had."""
        content = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": MAX_TOKENS,
        }
        for tried in range(1, TRIES + 1):
            wait = min(PAUSE * 2 ** (tried - 1), LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            try:
                return _text(self._post(content))
            except urllib.error.HTTPError as error:
                said = f"HTTP {error.code} {error.reason}: {_message(error)}"
                if error.code not in AGAIN and error.code < 500:
                    raise UserError(f"the judge at {self.url} refuses {self.model}: {said}") from None
                wait = max(wait, _retry_after(error))
            except (OSError, http.client.HTTPException) as error:  # no connection, a lost one, a time-out
                said = str(error) or type(error).__name__
            except ValueError as error:
                said = f"no chat completion: {error}"
            if tried < TRIES:
                logger.info("the judge failed (%s); again in %.0f s", said, wait)
                time.sleep(wait)
        raise UserError(
            f"the judge at {self.url} failed {TRIES} times, the last time with: {said}\n"
            "What was graded is kept: the same command goes on from there."
        )

    def _post(self, content: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(content).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            return reply.read()


def _text(reply: bytes) -> str | None:
    """The text of a chat completion, which may be null. Raises ValueError for anything else."""
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = ...
    if not isinstance(text, str | None):
        raise ValueError(f"the reply is {reply[:200]!r}")
    return text


def _message(error: urllib.error.HTTPError) -> str:
    try:
        body = error.read()
    except (OSError, http.client.HTTPException):
        return "(no message)"
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace").strip() or "(no message)"


def _retry_after(error: urllib.error.HTTPError) -> float:
    """The seconds that the server asks for, at most the longest pause; 0 when it does not say."""
    try:
        return min(float(error.headers.get("Retry-After", 0)), LONGEST_PAUSE)
    except ValueError:  # a date
        return 0.0
