"""Labels: which tokens of a rendered conversation the model learns to produce."""

from itertools import accumulate

IGNORE = -100  # torch's cross entropy skips this label
Span = tuple[int, int]  # characters [begin, end) of a rendered text


def mask(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """Labels: the ids of the tokens that begin inside a span, and IGNORE for the others.

    A token that begins before a span and ends inside it also holds the end of the prompt. The model never has to
    produce it after that prompt, so it is not supervised. `fit.py` refuses templates that start every answer with such
    a token. One case remains: an answer that begins with a line break after a prompt that ends with one (`native`
    ChatML), because BPE may join the two.
    """
    labels = [IGNORE] * len(ids)
    # A byte-level tokenizer with a prefix space puts a space that it trims to nothing behind the token that follows it.
    starts = list(accumulate((begin for begin, _ in reversed(offsets)), min))[::-1]
    at = 0
    for begin, end in spans:
        while at < len(ids) and starts[at] < begin:
            at += 1
        while at < len(ids) and starts[at] < end:
            labels[at] = ids[at]
            at += 1
    return labels
