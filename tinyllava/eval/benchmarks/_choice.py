"""Find out which option of a multiple-choice question a free answer names.

    choose_option("The answer is (B) blue.", ["red", "blue"])     # 1
    choose_option("B. red", ["red", "blue"])                      # None: the letter of one option, the text of another

The official benchmarks have parsers of their own, which must not be changed. This one is for a user's own questions.
"""

import re
import unicodedata
from collections.abc import Sequence

# "**B**", "`B`", "$B$", "\boxed{B}", "<answer>B</answer>", "# B", "- B", "B</s>" and "\u201cB\u201d" are B.
MARKS = re.compile(
    r"\\(?:boxed|text|mathrm|mathbf)\b|</?(?:answer|s)>|<\|[^|]*\|>|[*`${}\"\u201c\u201d]|^(?:#+|[-\u2022]) +",
    re.MULTILINE,
)
THOUGHTS = re.compile(r"<think>.*?</think>|^.*</think>|<think>.*", re.DOTALL)  # a mark may be in the prompt, or cut off
# What people and models write before their choice, in English and Chinese.
LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore|hence|sure|i (?:think|believe|choose|pick|select|go with)"
    r"|i(?: would|'d|'ll| will) (?:say|choose|pick|select|go with)|choose|pick|select(?:ed)?|assistant|my|the|correct"
    r"|right|best|final|most likely|answer|ans\.?|option|choice|letter|it|this|that|is|are|would be|should be|must be"
    r"|'s|=)"
    r"(?=[\s:,'!=(]|$)[\s:,!=]*|(?:正确)?答案|应该|应|是|为|我?选择?|选项|[:,\s]+)+"
)
# Where an answer is named inside a text: "Based on the image, the answer is B."
STATEMENT = re.compile(
    r"\b(?:answer|option|choice)(?: to (?:the|this|your) question)?\s*(?:is|would be|should be|:)[\s:]*"
)
SEPARATORS = r"[.:),;!/\]\u3001\u3002\u2013\u2014-]"
LETTER = re.compile(rf"^[(\[\"'_]?([a-z])[)\]\"'_]*(?:(?P<separator>\s*{SEPARATORS}+\s*|\s+)(?P<rest>.*))?$")
# "B is correct", "B because the sky is blue"
CONFIRMED = re.compile(r"^(?:(?:is|would be|seems) (?:the )?(?:correct|right|best|answer)|because|since)\b")
ANOTHER = re.compile(r"^(?:and |or |& )?[a-z](?: ?[,&/]| and | or |$)")  # "B, C and D"
# Characters in which a second option is looked for. Small models repeat themselves: "B. B. B. B. ..."
REACH = 300
TEXT_WITH_LETTER = re.compile(r"^(?P<text>.+?)\s*[(\[]([a-z])[)\]]$")  # "blue (B)"


def normalize(text: str) -> str:
    """Normalise to lower case and single spaces, without a final period and a leading article: "A  cat." is "cat"."""
    return re.sub(r"^(a|an|the) (?=\S)", "", _fold(text))


def _fold(text: str) -> str:
    """Lower case, single spaces, no final period."""
    return " ".join(text.lower().split()).rstrip(".\u3002").rstrip()


def choose_option(text: str, options: Sequence[str]) -> int | None:
    """The index of the option that an answer names by its text, its letter or both; None if it names none, or two.

    An option that is itself a letter is named by its text: "b" names the first of ("b", "a").
    """
    exact = [normalize(option) for option in options]
    if (whole := normalize(text)) in exact:
        return exact.index(whole)
    known = _remove_labels([_fold(_unify(option)) for option in options])
    # A line break ends a statement, as a colon does: "B\nThe sky is blue."
    answer = _fold(re.sub(r"[ \t]*\n\s*", ": ", _unify(text).strip()))
    # Where an answer is named inside a text. Two statements that differ name none.
    reach = REACH + max(map(len, known), default=0)
    ends = [found.end() for found in STATEMENT.finditer(answer)]
    stated = {_match(_skip(answer[end : end + reach]), known) for end in ends} - {None}
    if len(stated) > 1:
        return None
    found = (_match(answer, known), _match(_skip(answer), known), *stated)
    return next((index for index in found if index is not None), None)


def _skip(answer: str) -> str:
    """The answer without the words before the choice."""
    return LEAD_IN.sub("", answer)


def _unify(text: str) -> str:
    """The text without Markdown, LaTeX and thoughts. Full-width characters of Chinese answers become ASCII."""
    plain = unicodedata.normalize("NFKC", THOUGHTS.sub("", text)).replace("\u2018", "'").replace("\u2019", "'")
    return MARKS.sub("", plain)


def _remove_labels(options: list[str]) -> list[str]:
    """The options' texts without the letters that they carry themselves, as in ["A. red", "B. blue"]."""
    bare = [re.sub(rf"^[(\[]?{_to_letter(index)}{SEPARATORS}+\s*", "", text) for index, text in enumerate(options)]
    has_labels = all(short and short != text for short, text in zip(bare, options, strict=True))
    return [re.sub(r"^(a|an|the) (?=\S)", "", text) for text in (bare if has_labels else options)]


def _to_letter(index: int) -> str:
    return chr(ord("a") + index)


def _match(answer: str, known: list[str]) -> int | None:
    """The index of the option that a folded answer names, without words before it."""
    if (text := normalize(answer.strip("'"))) in known:
        return known.index(text)
    if match := LETTER.match(answer):
        index = _find_letter(match[1], known)
        if index is None or _agrees(match["rest"] or "", index, known, spaced=not (match["separator"] or "").strip()):
            return index
        return None
    if match := TEXT_WITH_LETTER.match(answer):
        index = _find_letter(match[2], known)
        return index if index is not None and normalize(match["text"]) == known[index] else None
    return None


def _find_letter(letter: str, known: list[str]) -> int | None:
    if letter in known:
        return known.index(letter)
    index = ord(letter) - ord("a")
    return index if index < len(known) else None


def _agrees(rest: str, index: int, known: list[str], spaced: bool) -> bool:
    """Whether the words after a letter leave it the choice.

    spaced: only a space is between them. "B blue" is a choice, "a sunny day" is not.
    """
    if not rest or normalize(rest.strip("()[]= '")) == known[index] or CONFIRMED.match(rest):
        return True
    if spaced or ANOTHER.match(rest) or _lists_another(rest, index, known):
        return False
    named = _match(rest[:REACH], known)  # "B. red", "B, C"
    if named is None:
        named = _find_first_named(rest, known)
    return named in (None, index)


def _lists_another(rest: str, chosen: int, known: list[str]) -> bool:
    """Whether `rest` lists another option with its letter: an answer that repeats all options chooses none."""
    return any(
        re.search(rf"(?<!\w){_to_letter(index)}{SEPARATORS}+\s*{re.escape(option)}(?!\w)", rest)
        for index, option in enumerate(known)
        if option and index != chosen
    )


def _find_first_named(text: str, known: list[str]) -> int | None:
    """The option whose text occurs first in `text` as whole words. Of two at one place, the longer counts."""
    places = [
        (match.start(), -len(option), index)
        for index, option in enumerate(known)
        if option and (match := re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text))
    ]
    return min(places)[2] if places else None
