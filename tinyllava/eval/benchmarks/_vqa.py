"""The text rules that the VQA v2 scorer and its descendant in TextVQA (M4C, EvalAI) share, quirks included.

Source: `processPunctuation` and `processDigitArticle` of GT-Vision-Lab/VQA `vqaEval.py` (a013f00).
"""

import functools
import re
from typing import Any

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # the colon, the apostrophe and % $ & * # stay
# Of the periods before a non-digit only 32 go: the official code hands re.UNICODE (= 32) to re.sub() as its `count`.
PERIOD_LIMIT = 32
# The official scorer is Python 2 code, where \d is 0-9; its Python 3 copies match any Unicode digit.
PERIOD = {True: re.compile(r"\.(?!\d)", re.ASCII), False: re.compile(r"\.(?!\d)")}
DIGIT_COMMA = {True: re.compile(r"\d,\d", re.ASCII), False: re.compile(r"\d,\d")}

ARTICLES = {"a", "an", "the"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}

# The official table lists forms with one apostrophe under the word without it ("dont"), and forms with more under each
# spelling that lacks exactly one ("couldn'tve" and "couldnt've" are there, "couldntve" is not). Its keys with a capital
# (Im, Ive, Id've) can never match, since words are lower-cased first; its "let's" and "she's" change nothing.
_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
}
_SINGLE = [stem + ending for ending, stems in _ENDINGS.items() for stem in stems.split()]
_SINGLE += ["ma'am", "o'clock", "'twas", "y'all"]
_ENDINGS_OF_TWO = {
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "y'all",
}
_DOUBLE = [stem + ending for ending, stems in _ENDINGS_OF_TWO.items() for stem in stems.split()] + ["'ow's'at"]
CONTRACTIONS = {form.replace("'", ""): form for form in _SINGLE}
CONTRACTIONS |= {
    form[:at] + form[at + 1 :]: form for form in _DOUBLE for at, character in enumerate(form) if character == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has this one the wrong way round


def strip_punctuation(text: str, ascii_digits: bool = False) -> str:
    """Each punctuation mark is removed if it stands beside a space anywhere, or if any comma stands between digits;
    otherwise it becomes a space. Then the first 32 periods that no digit follows are removed."""
    comma_in_number = DIGIT_COMMA[ascii_digits].search(text) is not None
    result = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or comma_in_number else " ")
    return PERIOD[ascii_digits].sub("", result, count=PERIOD_LIMIT)


def normalize_words(text: str) -> str:
    """Lower case, single spaces, number words to digits, no articles, apostrophes put back into contractions."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(text: str) -> str:
    """Newlines and tabs as spaces, ends stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(maxsize=1 << 16)
def normalize_m4c(text: str) -> str:
    """EvalAI's normaliser (M4C): all commas and question marks go first, `'s` is split off, then VQA's own steps.

    Source: `EvalAIAnswerProcessor` of TinyLLaVA's `m4c_evaluator.py` (53f12c7).
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_words(strip_punctuation(one_line(text)))


def leave_one_out(prediction: str, answers: list[tuple[str, Any]]) -> float:
    """Mean over the human answers of min(1, matches among the other answers / 3): 0, .3, .6, .9, 1 of ten answers.

    Antol et al. 2015 (VQA), section 5. An answer is (text, whatever tells it from an equal text by another human).
    """
    if prediction not in (text for text, _ in answers):
        return 0.0
    accuracies = []
    for answer in answers:
        matches = sum(other[0] == prediction for other in answers if other != answer)
        accuracies.append(min(1.0, matches / 3))
    return sum(accuracies) / len(accuracies)
