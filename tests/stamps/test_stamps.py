"""Stamps: the same questions on every machine, balanced answers, held-out data not in training, complete folders."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from tinyllava.data.sample import Sample
from tinyllava.errors import UserError
from tinyllava.stamps import TIERS, get_tier, prepare_tier, write
from tinyllava.stamps.compose import BACKGROUNDS, draw_scene
from tinyllava.stamps.library import TINTS, load_library
from tinyllava.stamps.plan import list_answers, plan_records, sample_scene
from tinyllava.stamps.questions import Context, find_relations
from tinyllava.stamps.roll_calls import ask_roll_call
from tinyllava.stamps.words import FONTS, HELD_OUT, HELD_OUT_FONTS, TRAIN, list_words

CORNERS = [
    (f"{row} {column}", rows, columns)
    for row, rows in (("top", range(3)), ("bottom", range(3, 6)))
    for column, columns in (("left", range(3)), ("right", range(3, 6)))
]
TRAINING_FILES = ("captions.json", "instructions.json", "validation.json")


def records(folder: Path, file: str) -> list[dict]:
    text = (folder / file).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if file.endswith(".jsonl") else json.loads(text)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return prepare_tier(tmp_path_factory.mktemp("stamps"), "tiny", scale=0.02)


def test_every_record_and_every_image_can_be_read(tiny):
    seen = set()
    for file in TRAINING_FILES:
        for record in records(tiny, file):
            Sample.from_llava(record).check()
            seen |= {record["image"]} if "image" in record else set()
    test = records(tiny, "test.jsonl")
    assert all({"question_id", "image", "text", "answer", "category"} <= set(record) for record in test)
    seen |= {record["image"] for record in test}
    assert seen == {f"images/{path.name}" for path in (tiny / "images").iterdir()}
    for image in seen:
        with Image.open(tiny / image) as picture:
            assert picture.convert("RGB").size == (64, 64)


def test_no_picture_is_in_two_subsets(tiny):
    used = Counter(
        image for file in TRAINING_FILES for image in {r["image"] for r in records(tiny, file) if "image" in r}
    )
    used.update({r["image"] for r in records(tiny, "test.jsonl")})
    assert set(used.values()) == {1}


def test_boxes_lie_inside_the_picture_and_apart(tiny):
    for line in records(tiny, "boxes.jsonl"):
        boxes = [thing["box"] for thing in line["things"]]
        assert all(0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64 for x0, y0, x1, y1 in boxes)
        for i, a in enumerate(boxes):
            assert all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for b in boxes[:i])


def test_manifest_names_every_file_with_its_hash(tiny):
    manifest = json.loads((tiny / "manifest.json").read_text())
    assert manifest["tier"] == "tiny" and manifest["seed"] == 0
    assert manifest["pictures"] == len(list((tiny / "images").iterdir()))
    assert set(manifest["files"]) == {path.name for path in tiny.iterdir()} - {"images", "manifest.json"}
    for file, entry in manifest["files"].items():
        assert hashlib.sha256((tiny / file).read_bytes()).hexdigest() == entry["sha256"]
        assert len(records(tiny, file)) == entry["records"]


def test_questions_and_boxes_are_the_same_on_every_machine(tiny):
    """A change here changes everybody's scores: raise stamps.write.VERSION with it."""
    manifest = json.loads((tiny / "manifest.json").read_text())
    assert {file: entry["sha256"][:16] for file, entry in manifest["files"].items()} == {
        "captions.json": "4a8b6d4aec4c9c0a",
        "instructions.json": "b2c3cf13842c7de7",
        "validation.json": "90156f49fd493a95",
        "test.jsonl": "ace8e08437485b3b",
        "boxes.jsonl": "73a9e6a321655c1f",
    }


@pytest.mark.parametrize("name", TIERS)
def test_test_answers_are_balanced(name):
    tier = get_tier(name)
    actual = defaultdict(Counter)
    for planned in plan_records(tier, 0, "test", 48):
        actual[planned.record["category"]][planned.record["answer"]] += 1
    assert list(actual) == list(list_answers(tier))
    assert actual["existence"] == {"yes": 24, "no": 24}
    for category, counts in actual.items():
        if category != "new_concepts":  # its answers are in turn by concept, and most concepts are animals
            assert max(counts.values()) <= 48 / min(48, len(list_answers(tier)[category])) + 1, category


def test_training_answers_are_balanced():
    """The share of the most frequent answer to each kind of question, which a blind model can learn."""
    actual = defaultdict(Counter)
    for planned in plan_records(get_tier("tiny"), 0, "instructions", 6000):
        turns = planned.record["conversations"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            text = question["value"].removeprefix("<image>\n")
            kind = " ".join(text.split()[:2]) if planned.scene else "text"
            actual[kind][answer["value"]] += 1
    yes_no = actual["Is there"] + actual["Can you"] + actual["Does the"]
    assert abs(yes_no["yes"] / yes_no.total() - 0.5) < 0.03
    for pair in (("left", "right"), ("above", "below")):
        sides = [actual["Is the"][side] for side in pair]
        assert max(sides) < 1.25 * min(sides)
    corners = actual["In which"] + actual["Where is"]
    assert max(corners.values()) < 0.3 * corners.total()
    counts = actual["How many"] + actual["Count the"]
    assert max(counts.values()) < 0.6 * counts.total()


def test_no_answer_can_be_copied_from_an_earlier_turn():
    for planned in plan_records(get_tier("tiny"), 0, "instructions", 800):
        heard = ""
        turns = planned.record["conversations"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            if planned.scene and answer["value"] in get_tier("tiny").concepts:
                assert not re.search(rf"\b{answer['value']}\b", heard)
            heard += f" {question['value']} {answer['value']}"


@pytest.mark.parametrize("name", ["small", "full", "pretrain"])
def test_held_out_concepts_words_and_fonts_are_never_trained(name):
    tier = get_tier(name)
    assert tier.held_out and not set(tier.held_out) & set(tier.concepts)
    for subset in ("captions", "instructions", "validation"):
        for planned in plan_records(tier, 0, subset, 300):
            shown = planned.scene.things if planned.scene else ()
            written = planned.scene.words if planned.scene else ()
            assert not {t.concept.name for t in shown} & set(tier.held_out)
            assert not {w.text for w in written} & set(list_words(HELD_OUT))
            assert not {w.font for w in written} & set(HELD_OUT_FONTS)
    new = [p for p in plan_records(tier, 0, "test", 40) if p.record["category"] == "new_concepts"]
    assert {p.scene.things[0].concept.name for p in new} <= set(tier.held_out)


def test_texts_agree_with_scenes_and_name_nothing_held_out():
    tier = get_tier("pretrain")
    names = sorted({*tier.concepts, *tier.held_out}, key=len, reverse=True)  # "kick scooter" names no scooter
    plurals = {load_library().concepts[name].plural: name for name in names}
    named = re.compile(rf"\b({'|'.join([*(p for p in plurals if ' ' in p), *names, *plurals])})\b")
    parts = {word for name in tier.concepts for word in name.split()} | {*BACKGROUNDS, *TINTS, "a"}
    corners = {corner: [6 * y + x for y in rows for x in columns] for corner, rows, columns in CORNERS}
    spelled, rasters, placed = 0, 0, []
    for planned in plan_records(tier, 0, "texts", 2000):
        assert planned.scene is None and "image" not in planned.record
        result = [turn["value"] for turn in planned.record["conversations"]]
        seen, _, asked = result[0].partition("\n")
        if raster := len(seen.split()) == 36 and "," not in seen:  # a word a patch, of names and of letters
            rasters += 1
            assert set(seen.split()) <= parts or any(word in asked for word in ("say", "written", "Read"))
        actual = set(named.findall(" ".join([asked, *result[1:]] if raster else result)))
        assert not {plurals.get(name, name) for name in actual} & set(tier.held_out) and "<image>" not in result[0]
        for question, answer in zip(result[::2], result[1::2], strict=True):
            if question.startswith("How do you spell"):
                spelled += 1
                assert question == f"How do you spell {answer.replace(' ', '')}?"
            if asked := re.fullmatch(r"In which corner is the (.*)\?", question):
                if raster:
                    placed.append(bool({seen.split()[i] for i in corners[answer]} & set(asked[1].split())))
                else:
                    assert re.search(rf"\b{asked[1]} {answer}\b", seen)
    assert spelled > 100 and 1000 < rasters < 1500
    assert len(placed) > 60 and np.mean(placed) > 0.97  # a pen may be too thin to be most of any patch


def test_roll_calls_agree_with_the_scene():
    tier, rng, seen = get_tier("full"), Random(0), Counter()
    for _ in range(4000):
        scene = sample_scene(tier, rng)
        turn = ask_roll_call(scene, Context(tier.concepts, tier.most), rng)
        if turn is None:
            continue
        question, answer = turn
        if question.endswith((" names.", " letters.", " letter.")):
            continue
        in_order = question.endswith(" Answer in order.")
        form, _, names = question.removesuffix(" Answer in order.").removesuffix("?").partition(": ")
        names, count = names.split(", "), Counter(t.concept.name for t in scene.things)
        where = {t.concept.name: t for t in scene.list_unique_things()}
        result = dict(zip(names, answer.removesuffix(".").split(", "), strict=True))
        assert in_order or all(told.startswith(f"{name} ") for name, told in result.items())
        result = {name: told.removeprefix(f"{name} ") for name, told in result.items()}
        assert len(set(names)) == len(names) and not set(names) & set(tier.held_out)
        seen[form.split(" the ")[0]] += 1
        if form.startswith("Which of these"):
            assert result == {name: "yes" if count[name] else "no" for name in names}
        elif form.startswith("How many"):
            assert result == {name: str(count[name]) for name in names}
        elif form.startswith("In which corner"):
            assert result == {name: scene.find_quadrant(where[name].box) for name in names}
        elif form.startswith("What colour"):
            assert result == {name: where[name].tint for name in names}
        else:
            other = where[form.partition(" the ")[2]]
            assert all(result[name] in find_relations(where[name], other) for name in names)
    assert len(seen) == 6 and min(seen.values()) > 30


@pytest.mark.parametrize("form", ["names", "letters"])
def test_multiple_choices_name_all_present_things(form):
    tier, rng, rights = get_tier("full"), Random(0), Counter()
    for _ in range(1500):
        scene = sample_scene(tier, rng)
        question, answer = ask_roll_call(scene, Context(tier.concepts, tier.most), rng, forms={form: 1})
        offered = dict(re.findall(r"([A-G])\. (.*?)(?= [A-G]\. | Answer )", question))
        if form == "names":
            names = question.partition(": ")[2].removesuffix("? Answer with the names.").split(", ")
            offered = dict(zip(names, names, strict=True))
        else:
            assert list(offered) == list("ABCDEFG")[: len(offered)]
        there = [key for key, name in offered.items() if name in {t.concept.name for t in scene.things}]
        assert not set(offered.values()) & set(tier.held_out)
        if question.endswith("yes or no for each letter."):
            told = [f"{letter} {'yes' if letter in there else 'no'}" for letter in offered]
        else:
            told = there
        assert 0 < len(there) < len(offered) and answer == f"{', '.join(told)}."
        rights[len(there)] += 1
    assert set(rights) == {1, 2, 3}


@pytest.mark.parametrize("subset", ["lists", "questions"])
def test_lists_name_nothing_held_out_and_have_every_answer_in_them(subset):
    tier = get_tier("pretrain")
    held = re.compile(rf"\b({'|'.join(name for name in tier.held_out if name != 'scooter')})\b")
    for planned in plan_records(tier, 0, subset, 500):
        question, answer = (turn["value"] for turn in planned.record["conversations"])
        assert planned.scene is None and not held.search(f"{question} {answer}")
        listed = question.partition("\n")[0]
        offered = dict(re.findall(r"([A-G])\. (.*?)(?= [A-G]\. | Answer )", question))
        if "Which of these" in question and not re.search("in order|with the", question):
            for told in answer.removesuffix(".").split(", "):
                name, _, yes = told.rpartition(" ")
                name = offered.get(name, name)
                there = re.search(
                    rf"(^|, )(an? )?(({'|'.join(TINTS)}) )?{re.escape(name)}( (top|middle|bottom)|[,.])", listed
                )
                assert (yes == "yes") == bool(there), (listed, told)
        if subset == "lists" and "corner" in question:
            assert set(answer.removesuffix(".").split(", ")) == set(listed.removesuffix(".").split(", "))


def test_words_to_read_are_unknown_and_do_not_overlap():
    tier, names, counts, spelled = get_tier("reading"), set(list_words(TRAIN) + list_words(HELD_OUT)), Counter(), 0
    assert tier.concepts == get_tier("full").concepts and tier.held_out == get_tier("full").held_out
    for planned in plan_records(tier, 0, "words", 1000):
        written = planned.scene.words
        question, answer = (turn["value"] for turn in planned.record["conversations"])
        counts[len(written)] += 1
        if "Spell" in question:
            spelled += 1
            assert answer == ", ".join(" ".join(word.text) for word in written)
        else:
            assert answer == ", ".join(word.text for word in written)
        assert not {word.text for word in written} & names
        assert not {word.font for word in written} & set(HELD_OUT_FONTS)
        assert all(re.fullmatch("[a-z]{3,8}", word.text) for word in written)
        boxes = [word.box for word in written]
        assert all(0 <= x0 < x1 <= 128 and 0 <= y0 < y1 <= 128 for x0, y0, x1, y1 in boxes)
        assert all(above[3] <= below[1] for above, below in pairwise(boxes))
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 250 and 250 < spelled < 420


def test_jitter_changes_colours_and_nothing_else():
    scene = sample_scene(get_tier("pretrain"), Random(0))
    assert scene.things[0].shade != (1.0, 1.0)
    calm = replace(scene, things=tuple(replace(t, shade=(1.0, 1.0)) for t in scene.things))
    changed = np.any(np.asarray(draw_scene(scene)) != np.asarray(draw_scene(calm)), axis=2)
    inside = np.zeros_like(changed)
    for left, top, right, bottom in (t.box for t in scene.things):
        inside[top:bottom, left:right] = True
    assert changed.any() and not (changed & ~inside).any()


def test_no_tier_trains_on_concepts_that_another_holds_out():
    full, small, tiny = (set(get_tier(name).concepts) for name in ("full", "small", "tiny"))
    assert tiny < small < full
    assert not full & set(get_tier("small").held_out)
    assert not set(list_words(TRAIN)) & set(list_words(HELD_OUT)) and not set(FONTS) & set(HELD_OUT_FONTS)


def test_near_synonyms_are_neither_neighbours_nor_negatives():
    near = load_library().list_near
    for planned in plan_records(get_tier("full"), 0, "test", 60):
        names = {t.concept.name for t in planned.scene.things}
        assert not any(a != b and a in near(b) for a in names for b in names)
        if planned.record["category"] == "existence" and planned.record["answer"] == "no":
            text = planned.record["text"]
            forbidden = set().union(*(near(name) for name in names))
            phrases = [load_library().concepts[name].phrase for name in forbidden]
            assert not any(text.endswith(f" {phrase} in the picture?") for phrase in phrases)


def test_only_countable_drawings_are_counted():
    for planned in plan_records(get_tier("full"), 0, "test", 60):
        if planned.record["category"] == "counting":
            assert all(t.concept.countable for t in planned.scene.things)


def test_every_drawing_can_be_shown_and_a_tint_is_the_colour_that_is_asked_for():
    for concept in load_library().concepts.values():
        for drawing in concept.drawings:
            image = load_library().load_image(drawing)
            assert min(image.size) > 8, drawing.file
            if drawing.hue is None:
                continue
            for tint, (hue, _, _) in TINTS.items():
                tinted = np.asarray(load_library().load_image(drawing, tint).convert("HSV"), dtype=float)
                vivid = tinted[(np.asarray(image)[..., 3] > 128) & (tinted[..., 1] > 64)]
                off = np.abs((vivid[:, 0] * 360 / 255 - hue + 180) % 360 - 180)
                assert np.mean(off < 20) > 0.8, (drawing.file, tint)


def test_an_incomplete_folder_is_never_used(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "draw_scene", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_tier(tmp_path, "tiny", scale=0.001)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    monkeypatch.undo()
    name = prepare_tier(tmp_path / "other", "tiny", scale=0.001).name
    (tmp_path / name / "images").mkdir(parents=True)  # left by a copy that was cut off: no manifest
    done = []
    folder = prepare_tier(tmp_path, "tiny", scale=0.001, progress=lambda *args: done.append(args))
    assert (folder / "test.jsonl").is_file() and done[-1][0] == done[-1][1]
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare_tier(tmp_path, "tiny", scale=0.001) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_two_processes_write_one_folder(tmp_path):
    code = f"from tinyllava.stamps import prepare_tier; print(prepare_tier({str(tmp_path)!r}, 'tiny', scale=0.004))"
    writers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {Path(writer.communicate()[0].strip()) for writer in writers}
    assert [writer.returncode for writer in writers] == [0, 0] and len(folders) == 1
    folder = folders.pop()
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, f"{folder.name}.lock"}
    pictures = json.loads((folder / "manifest.json").read_text())["pictures"]
    assert pictures == len(list((folder / "images").iterdir()))


def test_an_unknown_tier_is_refused():
    with pytest.raises(UserError, match="tiny, small, full"):
        prepare_tier("nowhere", "huge")
