"""Sample: both record conventions read to the same thing, and every broken one is told apart."""

import pickle

import pytest

from tinyllava.data.sample import Message, Sample, SampleError
from tinyllava.errors import UserError

QUESTION, ANSWER = Message("user", "<image>\nWhat is it?"), Message("assistant", "A kite.")


def test_from_llava():
    record = {
        "id": 7,
        "image": "7.jpg",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A kite."},
        ],
    }
    expected = Sample([Message("system", "Be brief."), QUESTION, ANSWER], ["7.jpg"], "7")
    assert Sample.from_llava(record) == expected
    assert Sample.from_llava({**record, "image": ["7.jpg", "8.jpg"]}).images == ["7.jpg", "8.jpg"]
    assert Sample.from_llava({**record, "image": None}).images == []
    assert Sample.from_llava({**record, "image": ""}).images == []
    record["conversations"][2]["value"] = None  # an evaluation set leaves the answer open
    assert Sample.from_llava(record).messages == expected.messages[:2]


def test_from_messages_takes_strings_and_parts():
    text = {
        "messages": [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A kite."}]
    }
    parts = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A kite."}]},
        ]
    }
    for record in (text, parts):
        assert Sample.from_messages({"id": "a", **record, "images": ["7.jpg"]}) == Sample(
            [QUESTION, ANSWER], ["7.jpg"], "a"
        )


def test_images_come_in_the_order_of_their_places():
    content = [
        {"type": "text", "text": "First <image>, then "},
        {"type": "image", "url": "own.jpg"},
        {"type": "image_url", "image_url": {"url": "https://own.png"}},
        {"type": "text", "text": "and last "},
        {"type": "image"},
    ]
    sample = Sample.from_messages({"messages": [{"role": "user", "content": content}], "images": ["a.jpg", "b.jpg"]})
    assert sample.images == ["a.jpg", "own.jpg", "https://own.png", "b.jpg"]
    assert sample.messages[0].text == "First <image>, then <image>\n<image>\nand last <image>\n"
    # A picture that no place asks for is kept, for `check` to report.
    left = Sample.from_messages({"messages": [{"role": "user", "content": "Hi"}], "images": ["a.jpg"]})
    assert left.images == ["a.jpg"]


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"id": "x"}, "no_conversation"),
        ({"id": "x", "conversations": []}, "no_conversation"),
        ({"id": "x", "conversations": ["Hi", "Hello"]}, "no_conversation"),
        ({"id": "x", "messages": [{"role": "user", "content": ["Hi"]}]}, "placeholders"),
        ({"id": "x", "conversations": [{"from": "human", "value": 3}]}, "no_conversation"),
        ({"id": "x", "conversations": [{"from": "human", "value": None}]}, "no_conversation"),
        ({"id": "x", "conversations": [{"from": "robot", "value": "Hi"}]}, "turn_order"),
        ({"id": "x", "conversations": [{"from": ["human"], "value": "Hi"}]}, "turn_order"),
        ({"id": "x", "messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "placeholders"),
    ],
)
def test_unreadable_records(record, kind):
    read = Sample.from_messages if "messages" in record else Sample.from_llava
    with pytest.raises(SampleError, match="sample 'x'") as caught:
        read(record)
    assert (caught.value.kind, caught.value.sample_id) == (kind, "x")


@pytest.mark.parametrize(
    ("messages", "images", "kind", "text"),
    [
        ([Message("system", "Be brief.")], [], "no_conversation", "empty"),
        ([ANSWER, QUESTION, ANSWER], ["a"], "turn_order", "turn 1 has the role 'assistant', expected 'user'"),
        ([QUESTION, QUESTION, ANSWER], ["a", "b"], "turn_order", "turn 2 has the role 'user', expected 'assistant'"),
        (
            [QUESTION, ANSWER, Message("system", "?")],
            ["a"],
            "turn_order",
            "turn 3 has the role 'system', expected 'user'",
        ),
        ([QUESTION, ANSWER, QUESTION], ["a", "b"], "turn_order", "ends with a turn of the user, expected an answer"),
        ([QUESTION, ANSWER], [], "placeholders", "1 <image> in its text, but 0 image"),
        ([QUESTION, ANSWER, QUESTION, ANSWER], ["a", "b", "c"], "placeholders", "2 <image> in its text, but 3 image"),
        ([QUESTION, Message("assistant", "<image>")], ["a", "b"], "placeholders", "an answer holds <image>"),
        ([QUESTION, Message("assistant", " \n")], ["a"], "empty_answer", "empty"),
    ],
)
def test_check(messages, images, kind, text):
    Sample([Message("system", "Be brief."), QUESTION, ANSWER], ["a"]).check()
    with pytest.raises(SampleError, match=text) as caught:
        Sample(messages, images, "x").check()
    assert caught.value.kind == kind


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(SampleError("placeholders", "1 <image>, 2 images", sample_id="x")))
    assert isinstance(error, UserError)
    assert (error.kind, error.sample_id, str(error)) == ("placeholders", "x", "sample 'x': 1 <image>, 2 images")
