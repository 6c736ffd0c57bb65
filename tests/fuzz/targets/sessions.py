"""What Python code asks of a session: questions, images and options of generation, in any order."""

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.harness import Case
from tests.fuzz.mutate import SCALARS, TEXTS, make_values
from tests.tiny_session import PICTURES, tiny_session
from tinyllava.data.sample import Message, Sample
from tinyllava.generation import HONOURED, INSTEAD, check_options, parse_decoding

NAMES = (
    [name for names in HONOURED for name in names.split()] + list(INSTEAD) + ["use_cache", "cache_implementation", "x"]
)
NAMES += [
    "do_sample",
    "penalty_alpha",
    "num_beam_groups",
    "return_dict_in_generate",
    "assistant_model",
    "inputs",
    "max_time",
]
VALUES = [
    True,
    False,
    None,
    0,
    1,
    2,
    3,
    -1,
    0.5,
    0.0,
    1.0,
    1.5,
    -0.5,
    1e-9,
    1e9,
    400,
    [1],
    [2, 3],
    [[1, 2]],
    {},
    [],
    (),
    "a",
    [""],
    ["."],
]
VALUES += [
    {(1,): 0.5},
    [[[1], 0.5]],
    {1: 2},
    (1, 1.5),
    (1.5, 1),
    lambda *a: [1],
    [lambda *a: True],
    np.int64(3),
    np.float32(0.5),
    b"a",
]
LIMIT = {"max_new_tokens": 3}  # of an answer: what is tried is the options


def build(folder: Path) -> list[Case]:
    session = tiny_session()
    Image.new("RGB", (24, 17), "red").save(folder / "a.png")
    values = st.one_of(st.integers(0, len(VALUES) - 1).map(VALUES.__getitem__), make_values(["a", "b"]))
    options = st.dictionaries(st.sampled_from(NAMES), values, max_size=3)
    image_forms = [
        *PICTURES[:2],
        str(folder / "a.png"),
        folder / "a.png",
        np.zeros((4, 4, 3), np.uint8),
        [],
        None,
        b"",
        "x.png",
    ]
    image_forms += [
        np.zeros(3),
        {"bytes": b""},
        {"path": str(folder / "a.png")},
        Image.new("L", (1, 1)),
        Image.new("RGB", (1, 999)),
        (),
        5,
    ]
    images = st.integers(0, len(image_forms) - 1).map(image_forms.__getitem__)
    texts = st.one_of(TEXTS, st.lists(TEXTS, max_size=3).map("".join), SCALARS)
    roles = st.sampled_from(["user", "user", "assistant", "system", "tool"])
    messages = st.lists(st.builds(Message, roles, texts), max_size=3)
    samples = st.builds(Sample, messages, st.lists(images, max_size=2), st.text(max_size=2))

    def chat(input: tuple[Any, Any, Any]) -> None:
        text, pictures, system = input
        session.reset(system)
        session.chat(text, pictures, **LIMIT)
        session.chat(text, **LIMIT)

    def stream(input: tuple[Any, Any, dict[str, Any]]) -> None:
        text, pictures, more = input
        session.reset()
        for _ in session.stream(text, pictures, **{**more, **LIMIT}):
            pass

    def generate(input: tuple[list[Sample], dict[str, Any]]) -> None:
        answers = session.generate(input[0], **{**input[1], **LIMIT})
        assert len(answers) == len(input[0])

    def score(input: tuple[Any, Any]) -> None:
        session.loglikelihood(*input)

    def parse(more: dict[str, Any]) -> None:
        check_options(**more)
        parse_decoding(session.model, **more)

    listed = st.one_of(st.lists(samples, max_size=2), samples, SCALARS)
    answers = st.one_of(st.lists(st.lists(texts, max_size=2), max_size=2), values)
    pictures = st.one_of(st.none(), images, st.lists(images, max_size=2))
    return [
        Case("sessions: options", options, parse),
        Case("sessions: chat", st.tuples(texts, pictures, st.one_of(st.none(), texts)), chat),
        Case("sessions: stream", st.tuples(TEXTS, images, options), stream),
        Case("sessions: generate", st.tuples(listed, options), generate),
        Case("sessions: likelihood", st.tuples(listed, answers), score),
    ]
