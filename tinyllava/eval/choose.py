"""Multiple choice by likelihood: `--tasks scienceqa-likelihood` takes the option that the model finds likeliest.

    -likelihood             the sum of the log-probabilities of an option's tokens
    -likelihood-per-token   their mean, with which a long option is not the less likely for its length

For benchmarks whose file has `choose_from(question)`: the answers to choose from, as the prompt asks for them. A
question without any is answered in words, as ever. The official rules then score the option as if it had been said.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question

SUFFIX = "-likelihood"
PER_TOKEN = "-per-token"


class Choice(NamedTuple):
    """How a benchmark's options are chosen from."""

    benchmark: Any
    per_token: bool

    @property
    def name(self) -> str:
        """What result files call it."""
        return f"likelihood{' per token' if self.per_token else ''}"

    def options(self, question: Question) -> tuple[str, ...]:
        """The answers to choose from; none where it has to be said in words."""
        return self.benchmark.choose_from(question)

    def pick(self, options: Sequence[str], likelihoods: Sequence[Any]) -> str:
        """The likeliest, the first of equals."""
        scores = [one.per_token if self.per_token else one.total for one in likelihoods]
        return options[scores.index(max(scores))]


def split_choice(name: str) -> tuple[str, bool | None]:
    """A task's name without the words that ask for a choice, and whether it is per token (None: no choice)."""
    for suffix, per_token in ((SUFFIX + PER_TOKEN, True), (SUFFIX, False)):
        if name.endswith(suffix):
            return name.removesuffix(suffix), per_token
    return name, None


def choice_of(name: str, benchmark: Any, per_token: bool | None) -> Choice | None:
    """The choice that a task's name asks for. Raises UserError for a benchmark without options."""
    if per_token is None:
        return None
    if not hasattr(benchmark, "choose_from"):
        raise UserError(f"{name}: {benchmark.TITLE} has no options to choose from. Ask it without '{SUFFIX}'.")
    return Choice(benchmark, per_token)
