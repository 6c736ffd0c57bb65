"""Which option of a multiple-choice question a free answer names."""

import pytest

from tinyllava.eval.benchmarks import custom
from tinyllava.eval.benchmarks._choice import choose_option

OPTIONS = ("red", "blue", "a cat", "light blue")

# All of them mean B, which is `blue`.
LETTER_ALONE = ["B", "b", "B.", "(B)", "B)", "[B]", "B:", "B;", "(b).", "'B'", '"B"', "  B  ", "Option B", "option (b)"]
LETTER_AND_TEXT = [
    *("B. blue", "(B) blue", "B) blue", "B: blue", "B - blue", "B \u2014 blue", "B, blue", "B blue", "B.blue"),
    *("blue (B)", "B\nblue", "B. The sky is blue and not red.", "B\n\nThe sky is blue, not red."),
]
TEXT_ALONE = ["blue", "Blue.", "It is blue.", "The answer is blue", "It's blue."]
SENTENCES = [
    *("The answer is B.", "The answer is B", "Answer: B", "the answer is (B) blue.", "Correct answer: B) blue"),
    *(
        "I think the answer is B, because it looks blue",
        "B is correct",
        "B is the correct answer.",
        "So the answer is: B",
    ),
]
MARKED = ["**B**", "`B`", "$B$", r"\boxed{B}", r"\boxed{\text{B}}", "<answer>B</answer>", "Final answer: **B. blue**"]
QUOTED = [
    "\u201cB\u201d",
    "\u201cB. blue\u201d",
    '"blue"',
    "The answer is 'blue'.",
    "_B_",
    "B!",
    "B</s>",
    "B<|im_end|>",
]
IN_TEXT = [
    *("Based on the image, the answer is B.", "Looking at the sky, the correct option is (B) blue.", "Sure! Answer: B"),
    *(
        "The sky has one colour.\nThe answer to the question is B: blue.",
        "It is not red. **Answer:** B",
        "ASSISTANT: B",
    ),
    *("### Answer: B", "- B", "I'd say B.", "I'll go with (B) blue.", "Choose B", "Ans: B", "B (blue)", "(B) (blue)"),
    *("B because the sky is not red", "B, because A is red.", "The answer is B since it is not red"),
    *("<think>A is red? The answer is A.</think>B", "A is red. So</think>\n\nB", "<think>A?</think><answer>B</answer>"),
]
CHINESE = ["\uff08\uff22\uff09", "答案是B", "答案\uff1aB", "正确答案是B。", "选B", "选择B", "B。", "B、blue"]

# None of them names one option.
NO_CHOICE = [
    *("B. red", "(B) red", "B. light blue", "A: blue", "blue (A)"),  # the letter of one, the text of another
    *("A or B", "A, B", "B/C", "B and C", "red or blue", "Both"),  # two
    *("A. red\nB. blue\nC. a cat", "B. blue or D. light blue", "B, C and D", "The answer is A. No, the answer is B."),
    *("<think>The answer is B", "I cannot see which answer is right.", "The answer is not A or B."),
    *("not B", "The answer is not B", "E", "E. blue", "", "?", "purple", "Because", "the sky", "Yes"),
]


@pytest.mark.parametrize(
    "answer", LETTER_ALONE + LETTER_AND_TEXT + TEXT_ALONE + SENTENCES + MARKED + QUOTED + IN_TEXT + CHINESE
)
def test_answers_that_name_one_option(answer: str) -> None:
    assert choose_option(answer, OPTIONS) == 1
    assert custom.score(answer, "blue", "choice", OPTIONS) == 1.0
    assert custom.score(answer, "red", "choice", OPTIONS) == 0.0


@pytest.mark.parametrize("answer", NO_CHOICE)
def test_answers_that_name_none_or_two(answer: str) -> None:
    assert choose_option(answer, OPTIONS) is None


@pytest.mark.parametrize(
    ("answer", "options", "index"),
    [
        ("A cat", OPTIONS, 2),  # an article is no letter
        ("The answer is a cat", OPTIONS, 2),
        ("The answer is A.", OPTIONS, 0),
        ("D. light blue", OPTIONS, 3),  # the longer of two texts
        ("b", ("b", "a"), 0),  # options that are letters are texts
        ("(b)", ("b", "a"), 0),
        ("Option B", ("b", "a"), 0),
        ("2", ("1", "2", "12"), 1),
        ("C. 12", ("1", "2", "12"), 2),
        ("B. 12", ("1", "2", "12"), None),
        ("A. Yes, it is.", ("Yes", "No"), 0),
        ("A. No", ("Yes", "No"), None),
        ("blue", ("A. red", "B. blue"), 1),  # options with letters of their own
        ("B", ("A. red", "B. blue"), 1),
        ("A. blue", ("A. red", "B. blue"), None),
        ("$5", ("$5", "$6"), 0),  # a mark of LaTeX that is part of the text
        ("B) $6", ("$5", "$6"), 1),
        ("B. 蓝色", ("红色", "蓝色"), 1),
        ("A. 蓝色", ("红色", "蓝色"), None),
        ("The Beatles", ("The Beatles", "It"), 0),  # words that could stand before an answer
        ("It", ("The Beatles", "It"), 1),
    ],
)
def test_options_of_all_kinds(answer: str, options: tuple[str, ...], index: int | None) -> None:
    assert choose_option(answer, options) == index


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B. " * 3000, 1),
        ("B. blue " * 3000, 1),
        ("B. red " * 3000, None),
        ("the answer is " * 3000, None),
        ("the answer is " * 3000 + "B", 1),
        ("(" * 9000, None),
    ],
)
def test_a_model_that_repeats_itself_is_read_too(answer: str, index: int | None) -> None:
    assert choose_option(answer, OPTIONS) == index


def test_long_options_are_read_whole() -> None:
    options = ["a red " + "very " * 200 + f"{kind}" for kind in ("car", "bus")]
    for answer in (
        "B",
        "B. " + options[1],
        options[1],
        "The answer is " + options[1],
        "So the answer is B: " + options[1],
    ):
        assert choose_option(answer, options) == 1
    assert choose_option("A. " + options[1], options) is None
