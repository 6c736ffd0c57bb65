"""MMMU's rules for open answers: what an answer may mean, and whether the gold is among it.

Source: `parse_open_response`, `normalize_str`, `eval_open` of MMMU-Benchmark/MMMU `mmmu/utils/eval_utils.py`, bb0b95a.
"""

import re
from collections.abc import Sequence

# What stands before the answer in a sentence. The official list has an equals sign too, for the last line only.
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")

NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234,567
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e-3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 12, 1.2, .5
)


def parse_open(response: str) -> set[str | float]:
    """Everything the answer may mean: its key parts and the numbers in them, normalised.

    A key part is, of each line, what follows an indicator word; without any, the whole response.
    """
    response = response.strip().strip(".").lower()
    # The official split also at ". " before a capital can never happen: all is lower case by now.
    lines = response.split("\n")
    tails = [_tail(line, last=number == len(lines) - 1) for number, line in enumerate(lines)]
    parts = [tail for tail in tails if tail and tail not in (":", ",", ".", "!", "?", ";", "'")] or [response]
    numbers = [number for part in parts for pattern in NUMBERS for number in re.findall(pattern, part)]
    return {meaning for text in [*parts, *numbers] for meaning in normalize_open(text)}


def _tail(line: str, last: bool) -> str:
    """The shortest text after the last occurrence of an indicator; of equals the first.

    Quirk: an indicator at the very end leaves nothing, and then the search starts anew with the next indicator.
    """
    shortest = ""
    for word in (*INDICATORS, "=") if last else INDICATORS:
        if word in line:
            tail = line.split(word)[-1].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def normalize_open(text: str) -> list[str | float]:
    """A number rounded to two decimals, else the text in lower case; a single character with a space before or after,
    so that it does not match inside words."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def score_open(prediction: set[str | float], answer: str | Sequence[str]) -> bool:
    """Whether a gold text is contained in a predicted text, or a gold number is a predicted one. Gold may be a list."""
    golds = [gold for one in ([answer] if isinstance(answer, str) else answer) for gold in normalize_open(one)]
    texts = [gold for gold in golds if isinstance(gold, str)]
    return any(any(gold in said for gold in texts) if isinstance(said, str) else said in golds for said in prediction)
