"""What each patch is told, and the words that stand for a picture in a language model's pretraining."""

from random import Random

import numpy as np
import pytest

from tinyllava.data.stamps import patches, tier, words
from tinyllava.data.stamps.compose import Scene, Thing, Word, render
from tinyllava.data.stamps.library import library
from tinyllava.data.stamps.plan import sample, word
from tinyllava.data.stamps.words import FONTS, HELD_OUT, TRAIN, split

GROUND = {"background": "blue", "shades": ((105, 150, 235),) * 2, "pattern": "plain"}


def thing(name: str, box: tuple[int, int, int, int], tint: str | None = None) -> Thing:
    concept = library().concepts[name]
    return Thing(concept, concept.drawings[0], box, tint)


def told(scene: Scene, concepts: tuple[str, ...] = ("cat", "balloon")) -> dict[str, list[str | None]]:
    """The word of each patch, by sort; None where it is told none."""
    known = patches.vocabulary(concepts)
    rows = patches.described(scene, 6, known)
    return {
        sort: [None if i == patches.UNKNOWN else known[sort][i] for i in row]
        for sort, row in zip(known, rows.tolist(), strict=True)
    }


def test_a_patch_is_told_what_is_there_and_nothing_where_it_is_not_certain() -> None:
    # patches of 16 px: the cat takes nine of them, the balloon two and a quarter of the next two
    scene = Scene(96, things=(thing("cat", (0, 0, 48, 48)), thing("balloon", (64, 80, 92, 96), "red")), **GROUND)
    found = told(scene)
    name = np.array(found["name"], dtype=object).reshape(6, 6)
    assert (name[:3, :3] == "cat").all() and (name[:3, 3:] == "nothing").all() and (name[5, 4:] == "balloon").all()
    assert found["name"].count("cat") == 9 and found["name"].count("nothing") == 25
    assert found["kind"].count("animal") == 9 and found["colour"].count("red") == 2
    assert set(found["background"]) == {"blue"} and set(found["things"]) == {"two"}
    assert found["corner"].count("top left") == 9 and found["corner"].count("bottom right") == 2
    assert {*zip(found["column"], found["row"], found["count"], strict=True)} == {
        ("column 2", "row 2", "one"),  # the middle of the cat is at 24, of the balloon at 78, 88
        ("column 5", "row 6", "one"),
        (None, None, None),
    }
    assert found["part"][:3] == ["top left", "top middle", "top right"] and found["part"][12] == "bottom left"
    half = Scene(96, things=(thing("cat", (0, 0, 20, 16)),), **GROUND)  # a quarter of the second patch
    assert told(half)["name"][:3] == ["cat", None, "nothing"]


def test_a_patch_is_told_how_many_there_are_of_its_thing() -> None:
    boxes = [(0, 0, 32, 32), (64, 0, 96, 32), (0, 64, 32, 96)]
    scene = Scene(96, things=(*(thing("cat", box) for box in boxes[:2]), thing("balloon", boxes[2], "red")), **GROUND)
    found = told(scene)
    counts = {(name, count) for name, count in zip(found["name"], found["count"], strict=True) if count}
    assert counts == {("cat", "two"), ("balloon", "one")} and set(found["things"]) == {"three"}
    between = told(Scene(96, things=(thing("cat", (32, 0, 64, 32)),), **GROUND))
    assert set(between["corner"]) == {None} and set(between["column"]) == {"column 4", None}


def test_a_raster_says_each_thing_in_its_place() -> None:
    scene = Scene(96, things=(thing("cat", (0, 0, 48, 48)), thing("balloon", (64, 64, 96, 96), "red")), **GROUND)
    rows = np.array(patches.raster(scene).split()).reshape(6, 6).tolist()
    assert rows[0] == ["a", "cat", "cat", "blue", "blue", "blue"]
    assert rows[2] == ["cat", "cat", "cat", "blue", "blue", "blue"]
    assert rows[4] == ["blue"] * 4 + ["a", "red"] and rows[5] == ["blue"] * 4 + ["balloon", "red"]


@pytest.mark.parametrize("font", FONTS)
def test_letters_stand_where_they_are_drawn(font: str) -> None:
    """Every letter is told to the half patch that its middle is in, and the row reads as the word."""
    text = "zebra"
    whole = Word(text, font, (8, 30, 88, 50), dark=True)
    box, middles = words.placed(whole)
    picture = np.asarray(render(Scene(96, words=(whole,), **GROUND)).convert("L"), dtype=int)
    inked = np.argwhere(np.abs(picture - int(picture[0, 0])) > 40)
    assert np.abs(inked.min(0)[::-1] - box[:2]).max() <= 3 and np.abs(inked.max(0)[::-1] + 1 - box[2:]).max() <= 3
    assert list(middles) == sorted(middles) and box[0] < middles[0] and middles[-1] < box[2]
    columns = {text[i]: int(middle * 12 / 96) for i, middle in enumerate(middles)}
    found = told(Scene(96, words=(whole,), **GROUND))
    for letter, column in columns.items():
        sort = patches.LETTER_SORTS[column % 2]
        assert {p % 6 for p, said in enumerate(found[sort]) if said == letter} == {column // 2}
    rows = np.array(patches.raster(Scene(96, words=(whole,), **GROUND)).split()).reshape(6, 6)
    read = {"".join(said for said in row if said != "blue") for row in rows}
    assert read == {"", text}


def test_words_to_read_are_never_held_out_and_some_are_no_words() -> None:
    known, held = set(split(TRAIN)), set(split(HELD_OUT))
    size, rng = tier("pretrain"), Random(0)
    written = [word(size, rng).words[0].text for _ in range(3000)]
    assert not held & set(written) and all(3 <= len(text) <= 8 and text.isalpha() for text in written)
    assert 0.5 < np.mean([text not in known for text in written]) < 0.7
    full = {word(tier("full"), rng).words[0].text for _ in range(300)}
    assert not held & full and full - known


def test_patches_of_any_scene_agree_with_its_boxes() -> None:
    size, rng = tier("pretrain"), Random(1)
    known = patches.vocabulary(size.concepts)
    for _ in range(200):
        scene = sample(size, rng)
        name, kind, *_ = patches.described(scene, 6, known)
        owners, bare = patches.covered(scene, 6)
        assert {known["name"][i] for i in name if i > 0} <= {t.concept.name for t in scene.things}
        assert ((name == 0) == bare.ravel()).all() and ((name > 0) == (owners.ravel() >= 0)).all()
        assert (kind[name <= 0] == patches.UNKNOWN).all()
        assert len(patches.raster(scene).split()) == 36
