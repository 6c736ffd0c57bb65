"""Session: a batch changes nothing, transformers answers the same, a chat shows the model what training showed it."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tinyllava
from tests.conftest import LLAMA
from tests.image_forms import IMAGE, PIXELS, PNG, list_python_forms, list_text_forms, make_record
from tests.tiny_session import NEW, PICTURES, WORDS, question, tiny_session
from tinyllava import checkpoint
from tinyllava.data.encode import expand
from tinyllava.data.sample import Message, Sample, SampleError
from tinyllava.errors import UserError
from tinyllava.infer import Session, find_checkpoint, image_encoder, prompts


@pytest.fixture(scope="module")
def session() -> Session:
    """One model for the tests that do not change it."""
    return tiny_session()


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    """No conversation and no encoded picture from the test before."""
    if "session" in request.fixturenames:
        shared = request.getfixturevalue("session")
        shared.reset()
        shared.images.cache.clear()


def test_the_answers_are_those_of_transformers(session: Session, tmp_path: Path) -> None:
    checkpoint.save(session.vlm, tmp_path / "plain")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "plain")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    loaded = tinyllava.load(str(tmp_path / "plain"), device="cpu")
    samples = [question(seed, images=1) for seed in range(8)]
    texts = [loaded.template.encode_prompt(sample, loaded.tokenizer)["text"] for sample in samples]
    inputs = processor(
        images=[sample.images[0] for sample in samples],
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    )
    made = model.generate(**inputs, **NEW, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    wanted = [text.strip() for text in processor.batch_decode(made, skip_special_tokens=True)]
    assert loaded.generate(samples, batch_size=3, **NEW) == wanted
    assert len(set(wanted)) >= 4


def test_a_conversation_shows_the_model_what_training_shows_it(session: Session, monkeypatch) -> None:
    shown = []
    greedy = session.engine.generate_greedy
    monkeypatch.setattr(
        session.engine, "generate_greedy", lambda prompts, *rest: shown.append(prompts[0].ids) or greedy(prompts, *rest)
    )
    session.chat(WORDS[0], PICTURES[0], **NEW)
    session.chat("and <image> or <image>?", PICTURES[1:3], **NEW)
    session.chat(WORDS[2], **NEW)

    talk = session.conversation
    assert [message.role for message in talk.messages] == ["user", "assistant"] * 3
    assert talk.messages[0].text == f"<image>\n{WORDS[0]}" and len(talk.images) == 3
    encoded = session.template.encode(talk, session.tokenizer)
    ids, labels = (np.array(encoded[name]) for name in ("input_ids", "labels"))
    ids, labels = expand(ids, labels, session.model.config.image_token_id, session.processor.tokens_per_image)
    starts = [at for at in range(1, len(ids)) if labels[at] != -100 and labels[at - 1] == -100]
    assert [ids[:start].tolist() for start in starts] == shown


def test_a_failed_question_leaves_the_conversation_as_it_was(session: Session) -> None:
    session.reset("Be brief.")
    session.chat("hello", **NEW)
    before = session.conversation
    with pytest.raises(SampleError, match=r"nowhere\.png not found"):
        session.chat("and this?", "nowhere.png", **NEW)
    with pytest.raises(SampleError, match="2 <image> in its text, but 1 image"):
        session.chat("<image> or <image>?", PICTURES[0], **NEW)
    with pytest.raises(SampleError, match=r"nowhere\.png not found"):
        list(session.stream("and this?", "nowhere.png", **NEW))
    assert session.conversation is before and before.messages[0] == Message("system", "Be brief.")


def test_an_answer_that_spells_the_placeholder_does_not_break_the_next_turn(session: Session, monkeypatch) -> None:
    monkeypatch.setattr(session, "_answer_batch", lambda prompts, **_: [(0, "I see <image>.")])
    session.chat("hello")
    session.chat("really?")
    assert session.conversation.messages[1].text == "I see image."


def test_a_stream_is_the_answer_in_pieces(session: Session) -> None:
    for seed in range(6):
        (whole,) = session.generate([question(seed)], **NEW)
        pieces = list(session.stream_answer(question(seed), **NEW))
        assert "".join(pieces) == whole and len(pieces) > 1
    said = "".join(session.stream(WORDS[0], PICTURES[0], **NEW))
    assert session.conversation.messages[-1] == Message("assistant", said)


def test_a_stream_can_be_broken_off(session: Session) -> None:
    steps = []
    hook = session.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    stream = session.stream(WORDS[0], PICTURES[0], max_new_tokens=1000, min_new_tokens=1000)
    first = next(stream)
    before = threading.active_count()
    stream.close()
    hook.remove()
    assert threading.active_count() == before - 1 and len(steps) < 500  # the model has stopped
    assert session.conversation.messages[-1] == Message("assistant", first)


def test_what_a_stream_raises_arrives(session: Session, monkeypatch) -> None:
    def broken(**_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(session.model, "generate", broken)
    with pytest.raises(MemoryError, match="no room"):
        list(session.stream(WORDS[0]))


def count_encoded(session: Session, monkeypatch) -> list[int]:
    """Grows by the number of pictures of every run of the tower."""
    runs: list[int] = []
    encode = session.model.model.get_image_features
    monkeypatch.setattr(
        session.model.model, "get_image_features", lambda pixels: runs.append(len(pixels)) or encode(pixels)
    )
    return runs


@pytest.mark.parametrize("cached", [100, 2])
def test_every_picture_is_encoded_once(session: Session, monkeypatch, tmp_path: Path, cached: int) -> None:
    bytes_each = session.processor.tokens_per_image * session.model.config.text_config.hidden_size * 4
    monkeypatch.setattr(image_encoder, "IMAGE_CACHE", cached * bytes_each)
    for number, image in enumerate(PICTURES):
        image.save(tmp_path / f"{number}.png")
    samples = [
        Sample([Message("user", f"<image>\n{WORDS[at % 3]} {at}")], [str(tmp_path / f"{at % 4}.png")])
        for at in range(72)
    ]
    alone = [session.generate([sample], **NEW)[0] for sample in samples[:8]]
    session.images.cache.clear()
    runs = count_encoded(session, monkeypatch)
    answers = session.generate(samples, batch_size=4, **NEW)
    assert answers[:8] == alone
    assert sum(runs) == 4
    assert len(session.images.cache) == min(cached, 4)


def test_pictures_by_path_bytes_and_pil_are_the_same_and_a_changed_file_is_not(
    session: Session, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    PICTURES[0].save(path)
    stream = io.BytesIO()
    PICTURES[0].save(stream, "PNG")
    forms = [str(path), stream.getvalue(), PICTURES[0], {"bytes": stream.getvalue(), "path": None}]
    answers = [session.generate([Sample([Message("user", "<image>\nWhat?")], [form])], **NEW)[0] for form in forms]
    assert len(set(answers)) == 1
    PICTURES[3].save(path)
    os.utime(path, (1, 1))
    assert session.generate([Sample([Message("user", "<image>\nWhat?")], [str(path)])], **NEW)[0] != answers[0]


def test_every_form_of_an_image_gives_the_same_answer(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "a cat.png"
    path.write_bytes(PNG)
    (expected,) = session.generate([Sample([Message("user", f"<image>\n{WORDS[0]}")], [IMAGE])], **NEW)
    forms = list_text_forms(path) | list_python_forms(path)
    records = [
        Sample.from_messages({"messages": make_record(form, WORDS[0])["messages"][:1]}) for form in forms.values()
    ]
    direct = [Sample([Message("user", f"<image>\n{WORDS[0]}")], [form]) for form in forms.values()]
    for samples in (records, direct):
        assert dict(zip(forms, session.generate(samples, **NEW), strict=True)) == dict.fromkeys(forms, expected)
    for form in (path, path.as_uri(), PIXELS, io.BytesIO(PNG), {"type": "image", "image": PNG}):
        session.reset()
        assert session.chat(WORDS[0], form, **NEW) == expected


def test_the_page_on_images_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "images.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# describe\.py.*?)```", page, flags=re.S)
    monkeypatch.chdir(root)
    exec(compile(code, "describe.py", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first == second != ""


def test_each_row_stops_at_its_own_end(session: Session, monkeypatch) -> None:
    samples = [question(seed) for seed in range(8)]
    made = []
    text = type(session.reader).decode
    monkeypatch.setattr(type(session.reader), "decode", lambda self, ids: made.append(ids) or text(self, ids))
    session.generate(samples, batch_size=8, **NEW)
    monkeypatch.undo()
    counts = {token: sum(token in ids[1:] for ids in made) for token in {token for ids in made for token in ids}}
    end = max(counts, key=lambda token: counts[token])  # a token in the middle of several answers becomes an end
    monkeypatch.setattr(session, "reader", session.reader._replace(end_ids=frozenset({end})))
    monkeypatch.setattr(session.model.generation_config, "eos_token_id", [end])
    wanted = sorted(session.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids).strip() for ids in made)
    assert sorted(session.generate(samples, batch_size=8, **NEW)) == wanted
    assert [session.generate([sample], **NEW)[0] for sample in samples] == session.generate(samples, **NEW)


def test_an_end_of_turn_that_is_text_stops_and_is_not_streamed(session: Session, monkeypatch) -> None:
    whole = next(text for seed in range(9) if len(text := session.generate([question(seed)], **NEW)[0]) > 6)
    seed = next(seed for seed in range(9) if session.generate([question(seed)], **NEW)[0] == whole)
    end = whole[4:6]
    monkeypatch.setattr(session, "reader", session.reader._replace(end_text=end))
    wanted = whole.partition(end)[0].strip()
    assert session.generate([question(seed)], **NEW) == [wanted]
    assert "".join(session.stream_answer(question(seed), **NEW)) == wanted


def test_what_has_no_room_is_refused_and_a_short_rest_is_used_alone(monkeypatch) -> None:
    monkeypatch.setattr(prompts, "POOL", 1)  # a short rest in one pool is none of the next one's
    probe = tiny_session()
    samples = [question(seed, images=0) for seed in range(6)]
    samples.sort(key=lambda sample: -len(sample.messages[0].text))
    lengths = [probe.make_prompt(sample).length for sample in samples]
    longest = max(lengths) + 3
    session = tiny_session({**LLAMA, "max_position_embeddings": longest})
    answers = session.generate(samples, max_new_tokens=8)
    full = probe.generate(samples, max_new_tokens=8)
    short = probe.generate(samples, max_new_tokens=3)
    last = lengths.index(max(lengths))
    assert answers[last] == short[last] != full[last]
    for at, length in enumerate(lengths):
        if length + 8 <= longest:
            assert answers[at] == full[at]
    with pytest.raises(UserError, match=rf"takes \d+ positions with 2 image\(s\), and the LLM has {longest}"):
        session.generate([question(1, images=2)])


def test_sampling_is_on_request_and_the_llms_own_settings_are_not_taken_over() -> None:
    plain, tuned = tiny_session(), tiny_session()
    tuned.model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=3.0)
    tuned = Session(tuned.vlm)
    samples = [question(seed) for seed in range(4)]
    assert tuned.generate(samples, **NEW) == plain.generate(samples, **NEW)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(plain.generate(samples, temperature=1.5, **NEW))
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_run_a_stage_and_a_checkpoint_are_found(session: Session, tmp_path: Path, caplog) -> None:
    run = tmp_path / "run"
    (run / "pretrain").mkdir(parents=True)
    stages = {"pretrain": {"finished": True}, "finetune": {"finished": False}}
    (run / "run.json").write_text(json.dumps({"stages": stages}))
    with pytest.raises(
        UserError, match=r"no complete checkpoint in .*finetune/final, .*finetune/checkpoint-N, .*pretrain/final"
    ):
        find_checkpoint(run)
    with pytest.raises(UserError, match="is not a directory"):
        find_checkpoint(tmp_path / "other")

    def save(name: str) -> Path:
        checkpoint.save(session.vlm, run / name)
        return run / name

    final = save("pretrain/final")
    assert find_checkpoint(run) == find_checkpoint(run / "pretrain") == find_checkpoint(final) == final
    ninth, tenth = save("finetune/checkpoint-9"), save("finetune/checkpoint-10")
    assert find_checkpoint(run) == find_checkpoint(run / "finetune") == tenth
    (tenth / "tokenizer.json").unlink()  # half copied
    with caplog.at_level(logging.WARNING, "tinyllava"):
        assert find_checkpoint(run) == ninth
    assert "tokenizer.json is missing" in caplog.text
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        Session.load(tenth)
    assert tinyllava.load(str(run)).path == ninth


def test_wrong_devices_and_dtypes_are_refused(session: Session, tmp_path: Path) -> None:
    checkpoint.save(session.vlm, tmp_path / "c")
    with pytest.raises(UserError, match=r"unknown dtype 'float8'\. Known: auto, float32"):
        Session.load(tmp_path / "c", dtype="float8")
    with pytest.raises(UserError, match="no device 'gpu' on this machine"):
        Session.load(tmp_path / "c", device="gpu")
    with pytest.raises(UserError, match="cannot use attention 'flash'"):
        Session.load(tmp_path / "c", attn_implementation="flash")
    assert Session.load(tmp_path / "c", device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_importing_the_package_is_light_and_its_version_is_that_of_the_distribution() -> None:
    code = "import sys, tinyllava; assert tinyllava.load; print([m for m in ('torch', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project.get("version", tinyllava.__version__) == tinyllava.__version__


def test_wrong_arguments_of_load_are_refused_in_a_line(session: Session, tmp_path: Path) -> None:
    checkpoint.save(session.vlm, tmp_path / "c")
    for wrong, message in [
        ({"device": 5}, "no device '5' on this machine"),
        ({"device": "cpu:x"}, "no device 'cpu:x' on this machine"),
        ({"dtype": 3}, "unknown dtype '3'"),
        ({"dtype": torch.int8}, r"unknown dtype 'torch\.int8'"),
        ({"dtype": [1]}, r"unknown dtype '\[1\]'"),
        ({"attn_implementation": 3}, "cannot use attention '3'"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            tinyllava.load(str(tmp_path / "c"), **wrong)
        assert "\n" not in str(caught.value)
    for path in (None, 5, b"x", ["a"]):
        with pytest.raises(UserError, match="expected the path of a checkpoint, found"):
            tinyllava.load(path)
