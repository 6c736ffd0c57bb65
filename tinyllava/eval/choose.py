"""Multiple choice by likelihood: `--tasks scienceqa-likelihood` answers with the option that the model finds likeliest.

    -likelihood             compares the sums of the log-probabilities of the options' tokens
    -likelihood-per-token   compares their means, so that a long option is not less likely because of its length

This works for benchmarks with `has_options`. Their `choose_from(question)` returns the options, in the form that the
prompt asks for. A question without options gets a generated answer. The official rules score an option like any answer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Benchmark, Question

LIKELIHOOD = "-likelihood"
PER_TOKEN = "-per-token"


class Choice(NamedTuple):
    """How one of a benchmark's options is chosen."""

    benchmark: Benchmark
    per_token: bool

    @property
    def name(self) -> str:
        """The name in result files."""
        return f"likelihood{' per token' if self.per_token else ''}"

    def list_options(self, question: Question) -> tuple[str, ...]:
        """The options of a question; () if its answer must be generated."""
        return self.benchmark.choose_from(question)

    def pick(self, options: Sequence[str], likelihoods: Sequence[Any]) -> str:
        """The likeliest option. If several are equally likely, the first of them."""
        scores = [likelihood.per_token if self.per_token else likelihood.total for likelihood in likelihoods]
        return options[scores.index(max(scores))]


def split_choice(name: str) -> tuple[str, bool | None]:
    """A task's name without its suffix for a choice, and whether the choice is per token (None: no such suffix)."""
    # The longer suffix first, because the shorter one is a part of it.
    for suffix, per_token in ((LIKELIHOOD + PER_TOKEN, True), (LIKELIHOOD, False)):
        if name.endswith(suffix):
            return name.removesuffix(suffix), per_token
    return name, None


def build_choice(name: str, benchmark: Benchmark, per_token: bool | None) -> Choice | None:
    """The choice that a task's name asks for. Raises UserError for a benchmark without options."""
    if per_token is None:
        return None
    if not benchmark.has_options:
        raise UserError(f"{name}: {benchmark.title} has no options to choose from. Ask it without '{LIKELIHOOD}'.")
    return Choice(benchmark, per_token)
