"""Text rules, with their quirks, that the VQA v2 scorer and TextVQA's scorer (M4C, EvalAI) share.

Source: `processPunctuation` and `processDigitArticle` of GT-Vision-Lab/VQA `vqaEval.py` (a013f00).
"""

import functools
import re
from typing import Any

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # the colon, the apostrophe and % $ & * # are kept
# Only the first 32 periods are removed: the official code passes re.UNICODE (= 32) to re.sub() as its `count`.
PERIOD_LIMIT = 32
# The official scorer is Python 2 code, where \d is 0-9; its Python 3 copies match any Unicode digit.
PERIOD = {True: re.compile(r"\.(?!\d)", re.ASCII), False: re.compile(r"\.(?!\d)")}
DIGIT_COMMA = {True: re.compile(r"\d,\d", re.ASCII), False: re.compile(r"\d,\d")}

ARTICLES = {"a", "an", "the"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}

# The official table lists a form with one apostrophe under its spelling without it ("dont"). A form with two is under
# each spelling without exactly one of them ("couldn'tve" and "couldnt've", but not "couldntve"). Keys with a capital
# letter (Im, Ive, Id've) never match, because words are lower-cased first. Its "let's" and "she's" change nothing.
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
CONTRACTIONS["somebody'd"] = "somebodyd"  # in the official table, key and value of this entry are exchanged


def strip_punctuation(text: str, ascii_digits: bool = False) -> str:
    """Remove punctuation as the official code does.

    A mark is removed everywhere if it is beside a space anywhere, or if the text has a comma between two digits.
    Otherwise it becomes a space. Then the first 32 periods without a digit after them are removed.
    """
    comma_in_number = DIGIT_COMMA[ascii_digits].search(text) is not None
    result = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or comma_in_number else " ")
    return PERIOD[ascii_digits].sub("", result, count=PERIOD_LIMIT)


def normalize_words(text: str) -> str:
    """Normalise words: lower case, single spaces, digits for number words, no articles, apostrophes in contractions."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def join_lines(text: str) -> str:
    """Replace newlines and tabs by spaces, and strip both ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(maxsize=1 << 16)
def normalize_m4c(text: str) -> str:
    """Normalise as EvalAI (M4C) does: remove commas and question marks, split off `'s`, then apply VQA's steps.

    Source: `EvalAIAnswerProcessor` of TinyLLaVA's `m4c_evaluator.py` (53f12c7).
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_words(strip_punctuation(join_lines(text)))


def score_leave_one_out(prediction: str, answers: list[tuple[str, Any]]) -> float:
    """The mean over the human answers of min(1, matches among the other answers / 3): 0, .3, .6, .9 or 1 for ten.

    Source: Antol et al. 2015 (VQA), section 5. An answer is (text, a value that differs between two humans).
    """
    if prediction not in (text for text, _ in answers):
        return 0.0
    accuracies = []
    for answer in answers:
        matches = sum(text == prediction for text, human in answers if (text, human) != answer)
        accuracies.append(min(1.0, matches / 3))
    return sum(accuracies) / len(accuracies)
