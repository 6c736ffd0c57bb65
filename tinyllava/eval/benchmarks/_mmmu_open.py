"""MMMU's rules for open answers: all meanings that an answer may have, and whether one of them is right.

Source: `parse_open_response`, `normalize_str`, `eval_open` of MMMU-Benchmark/MMMU `mmmu/utils/eval_utils.py`, bb0b95a.
"""

import re
from collections.abc import Sequence

# Words before the answer in a sentence. The official list also has an equals sign, for the last line only.
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")

NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234,567
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e-3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 12, 1.2, .5
)


def parse_open(response: str) -> set[str | float]:
    """All meanings of an open answer: its key phrases and the numbers in them, normalised.

    The key phrase of a line is the text after an indicator word. Without any key phrase, it is the whole response.
    """
    response = response.strip().strip(".").lower()
    # The official code also splits at ". " before a capital letter. This never happens, because all is lower case here.
    lines = response.split("\n")
    tails = [_cut_tail(line, last=number == len(lines) - 1) for number, line in enumerate(lines)]
    phrases = [tail for tail in tails if tail and tail not in (":", ",", ".", "!", "?", ";", "'")] or [response]
    numbers = [number for phrase in phrases for pattern in NUMBERS for number in re.findall(pattern, phrase)]
    return {meaning for text in [*phrases, *numbers] for meaning in normalize_open(text)}


def _cut_tail(line: str, last: bool) -> str:
    """The shortest text after the last occurrence of an indicator. If several are equally short, the first of them.

    Quirk of the official code: after an indicator at the very end of the line, the search starts again with the next
    indicator.
    """
    shortest = ""
    for word in (*INDICATORS, "=") if last else INDICATORS:
        if word in line:
            tail = line.split(word)[-1].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def normalize_open(text: str) -> list[str | float]:
    """Normalise a text: a number is rounded to two decimals, and any other text is in lower case.

    A single character gets a space before it or after it, so that it does not match inside words.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def score_open(prediction: set[str | float], answer: str | Sequence[str]) -> bool:
    """Whether a predicted text contains a right text, or a predicted number is a right one. `answer` may be a list."""
    golds = [gold for right in ([answer] if isinstance(answer, str) else answer) for gold in normalize_open(right)]
    texts = [gold for gold in golds if isinstance(gold, str)]
    return any(
        any(gold in meaning for gold in texts) if isinstance(meaning, str) else meaning in golds
        for meaning in prediction
    )
