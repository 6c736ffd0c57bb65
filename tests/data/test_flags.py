"""What a record says beyond text and images is honoured, or counted by a kind of its own: flags, videos, tools."""

import math
from itertools import islice

import datasets
import pytest

from tests.data.test_dataset import build as build
from tests.data.test_template import (
    CHATS,
    CLOSING,
    HARD,
    TAGGED,
    THINKING,
    TOKENIZERS,
    answers,
    captions,
    supervised,
    with_template,
)
from tests.data.test_template import load as load
from tinyllava.commands.check_data import check_specs
from tinyllava.config import DataSpec
from tinyllava.data.sample import Message, Sample, SampleError
from tinyllava.data.sources import open_source
from tinyllava.data.template import Template
from tinyllava.errors import UserError

NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
QUESTION, ANSWER = ("user", "hi"), ("assistant", "yes")


def read(style: str, *turns: tuple, **record) -> Sample:
    """The sample of turns (role, text, keys of the turn) in one of the two conventions."""
    turns = [(*turn, {})[:3] for turn in turns]
    if style == "llava":
        record["conversations"] = [{"from": NAMES.get(role, role), "value": text, **keys} for role, text, keys in turns]
        return Sample.from_llava(record)
    return Sample.from_messages(
        {**record, "messages": [{"role": role, "content": text, **keys} for role, text, keys in turns]}
    )


def find_kind(style: str, *turns: tuple, **record) -> str | None:
    """The kind under which a record is counted, None for a good one. Its message is short."""
    try:
        read(style, *turns, **record).check()
    except SampleError as error:
        assert len(str(error)) < 260 and "\n" not in str(error)
        return error.kind
    return None


STYLES = pytest.mark.parametrize("style", ["llava", "messages"])
NOT_LEARNED = [
    *({"weight": value} for value in (0, 0.0, False, "0", "0.0", "false")),
    *(
        {key: value}
        for key in ("loss", "train", "training", "loss_weight", "loss_mask")
        for value in (0, False, "False")
    ),
    *({key: value} for key in ("mask", "masked", "ignore_loss") for value in (1, True, "true")),
    *({key: 0} for key in ("calc_loss", "has_loss", "use_loss", "is_train", "train_on", "learned", "is_learned")),
    {"weight": 1, "train": False},  # all flags must agree to learn
    {"loss": None, "weight": "no"},
]
LEARNED = [
    *({"weight": value} for value in (1, 1.0, True, "1", None, math.nan, "")),
    *({key: value} for key in ("loss", "train", "loss_weight") for value in (1, True, "true", None)),
    *({key: value} for key in ("mask", "masked", "ignore_loss") for value in (0, False, "false", None, [])),
    {"train_detail": None, "name": "bob", "score": 0},
]


@STYLES
def test_flags_of_turns_in_their_usual_spellings(style):
    for keys, expected in [*((keys, False) for keys in NOT_LEARNED), *((keys, True) for keys in LEARNED)]:
        sample = read(style, QUESTION, ("assistant", "one", keys), QUESTION, ANSWER)
        assert [message.learned for message in sample.messages] == [True, expected, True, True], keys
        assert [message.text for message in sample.messages] == ["hi", "one", "hi", "yes"]


@STYLES
@pytest.mark.parametrize(
    "keys",
    [
        *({"weight": value} for value in (0.5, 2, -1, "0.5", "half", [0, 1], {"a": 1})),
        *({"loss": 1.7}, {"loss_scale": 0.3}, {"mask": "mask.png"}, {"train": "yes and no"}),
        {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
        {"weight": "x" * 100_000},
    ],
    ids=lambda keys: str(keys)[:30],
)
def test_a_weight_that_cannot_be_honoured_is_counted(style, keys):
    assert find_kind(style, QUESTION, ("assistant", "yes", keys)) == "unsupported_weight"
    with pytest.raises(SampleError, match=f"`{next(iter(keys))}: .* of the user is neither 0 .* nor 1 .*remove it"):
        read(style, ("user", "hi", keys), ANSWER)


@STYLES
def test_only_answers_can_be_learned(style):
    for role in ("user", "system"):
        turns = [("system", "be brief"), QUESTION, ANSWER]
        for keys in ({"train": True}, {"loss": "true"}, {"training": 1}):
            flagged = [(*turn, keys) if turn[0] == role else turn for turn in turns]
            assert find_kind(style, *flagged) == "unsupported_weight", keys
        for keys in ({"train": False}, {"weight": 0}, {"weight": 1}, {"mask": True}, {"mask": False}, {"loss": None}):
            flagged = [(*turn, keys) if turn[0] == role else turn for turn in turns]
            assert read(style, *flagged) == read(style, *turns), keys


@STYLES
def test_a_flag_of_the_record_is_that_of_its_turns_unless_they_have_their_own(style):
    for record, expected in (
        ({"loss": False}, [False, True]),
        ({"weight": "0"}, [False, True]),
        ({"kto_tag": False}, [False, True]),
        ({"mask": True}, [False, True]),
        ({"weight": 1}, [True, True]),
        ({"mask": "segmentation.png"}, [True, True]),
        ({"mask": {"size": [2, 2], "counts": "abc"}}, [True, True]),
    ):
        sample = read(style, QUESTION, ("assistant", "a"), QUESTION, ("assistant", "b", {"train": True}), **record)
        assert [message.learned for message in sample.messages[1::2]] == expected, record
    assert find_kind(style, QUESTION, ANSWER, weight=0.5) == "unsupported_weight"


def test_a_flag_on_a_part_of_the_content():
    def answer(*flags: dict) -> list[dict]:
        return [{"type": "text", "text": "a", **flag} for flag in flags]

    assert not read("messages", QUESTION, ("assistant", answer({"weight": 0}))).messages[1].learned
    assert read("messages", QUESTION, ("assistant", answer({"weight": None}, {}))).messages[1].learned
    assert find_kind("messages", QUESTION, ("assistant", answer({"weight": 0}, {}))) == "unsupported_weight"
    assert find_kind("messages", ("user", answer({"train": True})), ANSWER) == "unsupported_weight"


def mute(sample: Sample, learned: set[int]) -> Sample:
    """The sample with only these of its answers learned."""
    turns = answers(sample)
    return Sample([Message(m.role, m.text, at not in turns or at in learned) for at, m in enumerate(sample.messages)])


OURS = [(name, kind, compat) for name in ["pretrain", *CHATS] for kind in TOKENIZERS for compat in (False, True)]


@pytest.mark.parametrize(("name", "kind", "compat"), [*OURS, ("native", "qwen", False)])
def test_labels_of_one_answer_are_exactly_its_labels_among_all(name, kind, compat, load):
    tokenizer, template = load(kind), Template.load(name, compat=compat)
    for case in ("picture", "many turns", "empty answer", "spaces", "end tokens", "separators", "system"):
        sample = template.adapt(captions(HARD[case]) if name == "pretrain" else HARD[case])
        whole = template.encode(sample, tokenizer)
        seen = [-100] * len(whole["labels"])
        for at in answers(sample):
            one = template.encode(mute(sample, {at}), tokenizer)
            assert one["input_ids"] == whole["input_ids"]  # the turn stays as context
            for place, label in enumerate(one["labels"]):
                assert label in (-100, whole["labels"][place]), case
                if label != -100:
                    assert seen[place] == -100, case
                    seen[place] = label
        assert seen == whole["labels"], case
        assert set(template.encode(mute(sample, set()), tokenizer)["labels"]) == {-100}


@pytest.mark.parametrize("source", [THINKING, TAGGED, CLOSING])
def test_flags_with_templates_of_others(source, load):
    tokenizer, template = with_template(load("qwen"), source), Template.load("native")
    turns = [Message("user", "One?"), Message("assistant", "First."), Message("user", "Two?")]
    sample = Sample([*turns, Message("assistant", "Second.")])
    for learned, expected in (({1}, ["First.<|im_end|>"]), ({3}, ["Second.<|im_end|>"]), (set(), [])):
        answered = [text.split("\n")[-1] for text in supervised(template, mute(sample, learned), tokenizer)]
        assert answered == expected


def test_a_template_that_does_not_mark_every_answer_cannot_honour_flags(load, tmp_path):
    (tmp_path / "some.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' or m.content == 'hush' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    template, tokenizer = Template.load(tmp_path / "some.jinja"), load("phi")
    turns = [Message(*turn) for turn in (QUESTION, ("assistant", "hush"), QUESTION, ANSWER)]
    template.encode(Sample(turns), tokenizer)
    turns[1].learned = False
    with pytest.raises(SampleError, match="marks 1 of 2 answers, so flags of turns cannot be honoured"):
        template.encode(Sample(turns), tokenizer)


# --- through files, caches, streams and truncation


def talk(identity: str, *flags: dict, **record) -> dict:
    turns = []
    for number, keys in enumerate(flags):
        turns += [
            {"from": "human", "value": f"question {number}?"},
            {"from": "gpt", "value": f"answer {number}", **keys},
        ]
    return {"id": identity, "conversations": turns, **record}


def list_learned(item: dict, tokenizer) -> list[str]:
    labels = item["labels"]
    return tokenizer.decode(labels[labels != -100]).replace(" answer", "answer").split("<|endoftext|>")[:-1]


def test_flags_reach_labels_from_every_kind_of_file(build, write, tokenizer, tmp_path, folder):
    records = [talk("a", {"weight": 0}, {}), talk("b", {}, {"weight": 1}), talk("c", {}, {})]
    expected = [["answer 1"], ["answer 0", "answer 1"], ["answer 0", "answer 1"]]
    table = datasets.Dataset.from_list(records)  # a turn without the key has a null
    table.to_parquet(tmp_path / "table.parquet")
    table.save_to_disk(tmp_path / "saved")
    messages = [
        {
            "id": record["id"],
            "messages": [
                {"role": "user", "content": turn["value"]}
                if turn["from"] == "human"
                else {"role": "assistant", "content": [{"type": "text", "text": turn["value"]}], **turn, "value": None}
                for turn in record["conversations"]
            ],
        }
        for record in records
    ]
    for path in (
        *(write(records), write(records, "lines.jsonl"), write(messages, "messages.jsonl")),
        *(str(tmp_path / "table.parquet"), str(tmp_path / "saved")),
    ):
        data = build(DataSpec(path=path))
        assert [list_learned(data[i], tokenizer) for i in range(3)] == expected, path
        stream = build(DataSpec(path=path, streaming=True))
        assert sorted(list_learned(item, tokenizer) for item in islice(stream, 3)) == sorted(expected), path


def test_a_record_of_which_nothing_is_learned_is_counted(build, write):
    records = [talk("good", {"weight": 0}, {}), talk("none", {"weight": 0}, {"weight": 0}), talk("all", {}, {}, loss=0)]
    data = build(write(records), on_bad_sample="skip")
    assert list(data.ids) == ["good"]
    assert data.bad_records.to_dict()["nothing_to_learn"]["ids"] == ["none", "all"]
    report = check_specs([DataSpec(path=write(records))], progress=False)  # without a tokenizer
    assert report.bad_records.to_dict()["nothing_to_learn"]["ids"] == ["none", "all"]
    with pytest.raises(UserError, match=r"2 nothing_to_learn \(none, all\).*leave nothing to learn"):
        build(write(records))


def test_a_shortened_record_keeps_its_flags_and_is_bad_without_them(build, write, tokenizer):
    def shorten(*flags: dict, **options):
        path = write([talk("ok", {}), talk("long", *flags)], "long.json")
        return build(path, max_length=limit, on_bad_sample="skip", **options)

    limit = int(build(write([talk("long", {}, {}, {})])).lengths[0]) - 1  # two rounds fit
    data = shorten({"weight": 0}, {}, {})
    assert list_learned(data[1], tokenizer) == ["answer 1"] and list(data.bad_records.to_dict()) == ["shortened"]
    for cut in (shorten({"weight": 0}, {"weight": 0}, {}), shorten({}, {}, {}, supervised_turns="last")):
        assert list(cut.ids) == ["ok"]
        assert cut.bad_records.to_dict()["nothing_to_learn"]["first"].endswith("nothing to learn (kept 2 of 3 rounds)")


def test_only_the_last_turn_is_learned_where_the_stage_says_so(build, write, tokenizer):
    records = [talk("a", {}, {}, {}), talk("b", {}), talk("c", {"weight": 0}, {}), talk("d", {}, {"weight": 0})]
    path = write(records)
    every, last = (build(path, supervised_turns=turns, on_bad_sample="skip") for turns in ("all", "last"))
    assert list(last.ids) == ["a", "b", "c"] and last.bad_records.to_dict()["nothing_to_learn"]["ids"] == ["d"]
    assert [list_learned(last[i], tokenizer) for i in range(3)] == [["answer 2"], ["answer 0"], ["answer 1"]]
    for i in range(3):
        assert last[i]["input_ids"].tolist() == every[i]["input_ids"].tolist()
    assert last.supervised.tolist() == [(last[i]["labels"][1:] != -100).sum() for i in range(3)]
    assert every.fingerprint == build(path, on_bad_sample="skip").fingerprint != last.fingerprint
    stream = build(DataSpec(path=path, streaming=True), supervised_turns="last", on_bad_sample="skip")
    learned = sorted(list_learned(item, tokenizer) for item in islice(stream, 3))
    assert learned == [["answer 0"], ["answer 1"], ["answer 2"]]


def test_a_changed_flag_is_read_again(build, write, tokenizer):
    assert list_learned(build(write([talk("a", {}, {})]))[0], tokenizer) == ["answer 0", "answer 1"]
    assert list_learned(build(write([talk("a", {}, {"weight": 0})]))[0], tokenizer) == ["answer 0"]


# --- what is not text and images

FULL = [
    "a.mp4",
    ["a.mp4"],
    {"bytes": b"x" * 100_000, "path": None},
    [{"path": "a.mp4"}],
    "data:video/mp4;base64," + "A" * 9999,
]
FULL.append([{"name": "f" * 40, "parameters": {name * 30: ["word " * 9] * 9 for name in "abcde"}}] * 9)
VOID = [None, "", [], {}, [None], [""], {"bytes": None, "path": None}, math.nan, False]


@STYLES
@pytest.mark.parametrize(
    ("key", "kind"),
    [
        *((key, "unsupported_video") for key in ("video", "videos", "video_path", "video_url")),
        *((key, "unsupported_audio") for key in ("audio", "audios", "speech", "audio_path")),
        *((key, "unsupported_tool") for key in ("tools", "functions")),
        *((key, "unsupported_preference") for key in ("rejected", "chosen", "rejected_response")),
        ("history", "unsupported_text"),
    ],
)
def test_records_that_hold_more_are_counted_by_kind(style, key, kind):
    for question in ("<video>\nwhat?", "what?"):
        turns = ("user", question), ANSWER
        for value in FULL:
            assert find_kind(style, *turns, **{key: value}) == kind
        for value in VOID:
            assert read(style, *turns, **{key: value}) == read(style, *turns), value
    assert find_kind(style, ("user", "what?", {key: "a.mp4"}), ANSWER) == kind  # in a turn
    literal = ("user", "what does <video> mean, and <audio>?"), ("assistant", "<video> is a tag")
    assert [message.text for message in read(style, *literal).messages] == [turn[1] for turn in literal]


def test_parts_and_roles_that_hold_more_are_counted_by_kind():
    kinds = {"video": "video", "video_url": "video", "audio": "audio", "input_audio": "audio", "file": "file"}
    kinds |= {"tool_use": "tool", "input_video": "video", "audio_url": "audio", "input_file": "file"}
    for part, kind in kinds.items():
        content = [{"type": "text", "text": "look"}, {"type": part, part: {"url": "data:" + "A" * 9999}}]
        assert find_kind("messages", ("user", content), ANSWER) == f"unsupported_{kind}"
    for part in ({"video": "a.mp4"}, {"type": "text", "text": "hi", "videos": ["a.mp4"]}):
        assert find_kind("messages", ("user", [part]), ANSWER) == "unsupported_video"
    for style in ("llava", "messages"):
        for role in ("tool", "function", "observation", "function_call", "tool_response"):
            assert find_kind(style, QUESTION, ("assistant", "calls"), (role, "x"), ANSWER) == "unsupported_tool"
        for key, kind in {"tool_calls": "tool", "function_call": "tool", "reasoning_content": "text"}.items():
            assert find_kind(style, QUESTION, ("assistant", None, {key: [{"name": "f"}]})) == f"unsupported_{kind}"
            assert find_kind(style, QUESTION, (*ANSWER, {key: None})) is None


@STYLES
def test_two_keys_for_images_must_agree(style):
    picture = {"bytes": b"1" * 9999, "path": None}
    turns = ("user", "<image>what?"), ANSWER
    for image, images, expected in (
        ("a.jpg", ["a.jpg"], ["a.jpg"]),
        (["a.jpg"], "a.jpg", ["a.jpg"]),
        (picture, [dict(picture)], [picture]),
        ("a.jpg", [], ["a.jpg"]),
        ("a.jpg", None, ["a.jpg"]),
        ("", ["a.jpg"], ["a.jpg"]),
        ({"bytes": None, "path": None}, ["a.jpg"], ["a.jpg"]),
    ):
        assert read(style, *turns, image=image, images=images).images == expected
    for image, images in (("a.jpg", "b.jpg"), ("a.jpg", ["a.jpg", "b.jpg"]), (picture, [{**picture, "bytes": b"2"}])):
        assert find_kind(style, *turns, image=image, images=images) == "contradiction"
    with pytest.raises(SampleError, match=r"`image` \['a.jpg'\] and `images` \['b.jpg'\] differ. Remove one"):
        read(style, *turns, image="a.jpg", images=["b.jpg"])


@STYLES
def test_images_and_boxes_in_unread_places_are_counted(style):
    for key in ("image", "images"):
        assert find_kind(style, ("user", "what?", {key: ["a.jpg"]}), ANSWER) == "placeholders"
        assert find_kind(style, ("user", "<image>?", {key: [None]}), ANSWER, image="a.jpg") is None
    for key in ("image_path", "image_url", "img"):
        assert find_kind(style, QUESTION, ANSWER, **{key: "a.jpg"}) == "unsupported_image_key"
        assert find_kind(style, QUESTION, ANSWER, **{key: None}) is None
        assert find_kind(style, ("user", "<image>?"), ANSWER, image="a.jpg", **{key: "https://origin"}) is None
    boxes = {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}
    for turns in ((QUESTION, ("assistant", "at <bbox>")), (("user", "find <ref-object>"), ANSWER)):
        assert find_kind(style, *turns, objects=boxes) == "unsupported_boxes"
        assert find_kind(style, *turns) is None and find_kind(style, *turns, objects={"ref": [], "bbox": []}) is None


@STYLES
def test_a_system_message_beside_the_turns_is_read(style):
    system = ("system", "be brief")
    for key in ("system", "system_prompt"):
        assert read(style, QUESTION, ANSWER, **{key: "be brief"}) == read(style, system, QUESTION, ANSWER)
        assert read(style, system, QUESTION, ANSWER, **{key: "be brief"}) == read(style, system, QUESTION, ANSWER)
        parts = ("system", [{"type": "text", "text": "be brief"}])
        assert read(style, parts, QUESTION, ANSWER, **{key: "be brief"}) == read(style, system, QUESTION, ANSWER)
        both = read(style, system, QUESTION, ANSWER, **{key: "be kind"}).messages
        assert both == [Message("system", "be kind\nbe brief"), Message(*QUESTION), Message(*ANSWER)]
        for value in VOID:
            assert read(style, QUESTION, ANSWER, **{key: value}) == read(style, QUESTION, ANSWER)
    assert find_kind(style, ("assistant", None), system="be brief") == "no_conversation"


@STYLES
def test_keys_that_change_nothing_are_not_read(style):
    other = {"source": "web", "license": "mit", "split": "train", "score": 0.3, "video_id": 7, "has_audio": True}
    other |= {"objects": {"bbox": [[1, 2]]}, "file": "a.json", "tool": "labelme", "name": "x", "width": 3, "lang": "en"}
    assert read(style, QUESTION, ANSWER, **other) == read(style, QUESTION, ANSWER)


def test_a_long_id_is_cut_in_messages(build, write):
    record = {"id": "9" * 9999, "messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(UserError, match="1 turn_order") as refused:
        build(write([record]))
    assert len(str(refused.value)) < 600


@STYLES
@pytest.mark.parametrize("key", ["weights", "loss_mask", "loss_weights"])
def test_flags_of_all_turns_in_one_list_are_counted(style, key):
    assert find_kind(style, QUESTION, ANSWER, **{key: [0, 1]}) == "unsupported_weight"


EMPTY_CELLS = [None, [None], "", [""], [], {}, {"bytes": None, "path": None}, [{"bytes": None, "path": None}]]
EMPTY_CELLS += [{"bytes": b"", "path": ""}, [{"bytes": b"", "path": None}], math.nan, [math.nan], " ", "null"]


@STYLES
@pytest.mark.parametrize("key", ["image", "images"])
def test_empty_cells_are_no_images(style, key):
    for cell in EMPTY_CELLS:
        assert read(style, QUESTION, ANSWER, **{key: cell}).images == [], cell
        assert find_kind(style, ("user", "<image> hi"), ANSWER, **{key: cell}) == "placeholders"
        asked = ("user", [{"type": "image", "image": cell}, {"type": "text", "text": "hi"}])
        assert read("messages", asked, ANSWER, images=["a.jpg"]).images == ["a.jpg"], cell


def test_text_only_rows_of_a_mixed_table(build, write, folder, tmp_path):
    picture = {"bytes": (folder / "red.jpg").read_bytes(), "path": None}
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    shown = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    for number, (full, *voids) in enumerate(
        [
            [picture, {"bytes": None, "path": None}, None, {"bytes": b"", "path": ""}],
            [[picture], [{"bytes": None, "path": None}], [None], []],
            ["red.jpg", "", None],
            [["red.jpg"], [""], [None], None],
        ]
    ):
        records = [{"id": "full", "image": full, "conversations": shown}]
        records += [{"id": f"void {at}", "image": void, "conversations": turns} for at, void in enumerate(voids)]
        table = str(tmp_path / f"{number}.parquet")
        datasets.Dataset.from_list(records).to_parquet(table)
        for path in [table] if "bytes" in str(full) else [table, write(records), write(records, "lines.jsonl")]:
            images = [sample.images for sample in open_source(DataSpec(path=path)).iterate_samples()]
            assert images == [full if isinstance(full, list) else [full], *([] for _ in voids)]
    data, stream = (build(DataSpec(path=str(tmp_path / "0.parquet"), streaming=streams)) for streams in (False, True))
    assert [item["pixel_values"] is None for item in data] == [False, True, True, True]
    assert sorted(item["pixel_values"] is None for item in islice(stream, 4)) == [False, True, True, True]


# --- two turns in a row


@STYLES
def test_turns_of_one_role_in_a_row_become_one(style, load):
    asked = read(
        style,
        *(("system", "be"), ("system", "brief"), ("user", "<image>"), ("user", "<image>\n"), ("user", "alike?")),
        *(("assistant", "No."), ("assistant", "Red, blue."), ("user", "And <image>?"), ("assistant", "Green.")),
        image=["a", "b", "c"],
    )
    one = read(
        style,
        *(("system", "be\nbrief"), ("user", "<image>\n<image>\nalike?"), ("assistant", "No.\nRed, blue.")),
        *(("user", "And <image>?"), ("assistant", "Green.")),
        image=["a", "b", "c"],
    )
    assert asked == one and asked.images == ["a", "b", "c"]
    for name in CHATS:
        for compat in (False, True):
            Template.load(name, compat=compat).encode(asked, load("qwen"))


@STYLES
def test_turns_that_cannot_be_joined_are_counted(style):
    answer = ("assistant", "more", {"weight": 0})
    assert find_kind(style, QUESTION, ANSWER, answer) == find_kind(style, QUESTION, answer, ANSWER) == "turn_order"
    with pytest.raises(SampleError, match="turn 3 has the role 'assistant', expected 'user': two answers in a row"):
        read(style, QUESTION, ANSWER, answer).check()
    assert find_kind(style, QUESTION, answer, answer) is None
    assert find_kind(style, QUESTION, ("system", "be brief"), ANSWER) == "turn_order"
    assert find_kind(style, QUESTION, ANSWER, ("system", "be brief"), QUESTION, ANSWER) == "turn_order"
