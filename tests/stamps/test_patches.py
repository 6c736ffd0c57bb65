"""The words of each patch, and the words that take the place of an image when the LLM is pretrained."""

from random import Random

import numpy as np
import pytest

from tinyllava.stamps import get_tier, patches, words
from tinyllava.stamps.compose import Scene, Thing, Word, draw_scene
from tinyllava.stamps.library import load_library
from tinyllava.stamps.plan import sample_scene, sample_word
from tinyllava.stamps.words import FONTS, HELD_OUT, TRAIN, list_words

GROUND = {"background": "blue", "shades": ((105, 150, 235),) * 2, "pattern": "plain"}


def thing(name: str, box: tuple[int, int, int, int], tint: str | None = None) -> Thing:
    concept = load_library().concepts[name]
    return Thing(concept, concept.drawings[0], box, tint)


def label_words(scene: Scene, concepts: tuple[str, ...] = ("cat", "balloon")) -> dict[str, list[str | None]]:
    """The word of each patch, by sort; None for a patch without a known word."""
    known = patches.build_vocabulary(concepts)
    rows = patches.label_patches(scene, 6, known)
    return {
        sort: [None if i == patches.UNKNOWN else known[sort][i] for i in row]
        for sort, row in zip(known, rows.tolist(), strict=True)
    }


def test_a_patch_has_the_words_of_its_thing_and_none_that_is_uncertain() -> None:
    # patches of 16 px: the cat takes nine of them, the balloon two and a quarter of the next two
    scene = Scene(96, things=(thing("cat", (0, 0, 48, 48)), thing("balloon", (64, 80, 92, 96), "red")), **GROUND)
    labels = label_words(scene)
    name = np.array(labels["name"], dtype=object).reshape(6, 6)
    assert (name[:3, :3] == "cat").all() and (name[:3, 3:] == "nothing").all() and (name[5, 4:] == "balloon").all()
    assert labels["name"].count("cat") == 9 and labels["name"].count("nothing") == 25
    assert labels["kind"].count("animal") == 9 and labels["colour"].count("red") == 2
    assert set(labels["background"]) == {"blue"} and set(labels["things"]) == {"two"}
    assert labels["corner"].count("top left") == 9 and labels["corner"].count("bottom right") == 2
    assert {*zip(labels["column"], labels["row"], labels["count"], strict=True)} == {
        ("column 2", "row 2", "one"),  # the middle of the cat is at 24, of the balloon at 78, 88
        ("column 5", "row 6", "one"),
        (None, None, None),
    }
    assert labels["part"][:3] == ["top left", "top middle", "top right"] and labels["part"][12] == "bottom left"
    half = Scene(96, things=(thing("cat", (0, 0, 20, 16)),), **GROUND)  # a quarter of the second patch
    assert label_words(half)["name"][:3] == ["cat", None, "nothing"]


def test_a_patch_knows_how_many_there_are_of_its_thing() -> None:
    boxes = [(0, 0, 32, 32), (64, 0, 96, 32), (0, 64, 32, 96)]
    scene = Scene(96, things=(*(thing("cat", box) for box in boxes[:2]), thing("balloon", boxes[2], "red")), **GROUND)
    labels = label_words(scene)
    counts = {(name, count) for name, count in zip(labels["name"], labels["count"], strict=True) if count}
    assert counts == {("cat", "two"), ("balloon", "one")} and set(labels["things"]) == {"three"}
    between = label_words(Scene(96, things=(thing("cat", (32, 0, 64, 32)),), **GROUND))
    assert set(between["corner"]) == {None} and set(between["column"]) == {"column 4", None}


def test_a_raster_names_each_thing_in_its_place() -> None:
    scene = Scene(96, things=(thing("cat", (0, 0, 48, 48)), thing("balloon", (64, 64, 96, 96), "red")), **GROUND)
    rows = np.array(patches.write_raster(scene).split()).reshape(6, 6).tolist()
    assert rows[0] == ["a", "cat", "cat", "blue", "blue", "blue"]
    assert rows[2] == ["cat", "cat", "cat", "blue", "blue", "blue"]
    assert rows[4] == ["blue"] * 4 + ["a", "red"] and rows[5] == ["blue"] * 4 + ["balloon", "red"]


@pytest.mark.parametrize("font", FONTS)
def test_letters_are_labelled_where_they_are_drawn(font: str) -> None:
    """Every letter belongs to the half patch that its middle is in, and the row reads as the word."""
    text = "zebra"
    whole = Word(text, font, (8, 30, 88, 50), dark=True)
    box, middles = words.locate_letters(whole)
    picture = np.asarray(draw_scene(Scene(96, words=(whole,), **GROUND)).convert("L"), dtype=int)
    inked = np.argwhere(np.abs(picture - int(picture[0, 0])) > 40)
    assert np.abs(inked.min(0)[::-1] - box[:2]).max() <= 3 and np.abs(inked.max(0)[::-1] + 1 - box[2:]).max() <= 3
    assert list(middles) == sorted(middles) and box[0] < middles[0] and middles[-1] < box[2]
    columns = {text[i]: int(middle * 12 / 96) for i, middle in enumerate(middles)}
    labels = label_words(Scene(96, words=(whole,), **GROUND))
    for letter, column in columns.items():
        sort = patches.LETTER_SORTS[column % 2]
        assert {p % 6 for p, result in enumerate(labels[sort]) if result == letter} == {column // 2}
    rows = np.array(patches.write_raster(Scene(96, words=(whole,), **GROUND)).split()).reshape(6, 6)
    read = {"".join(result for result in row if result != "blue") for row in rows}
    assert read == {"", text}


def test_words_to_read_are_never_held_out_and_some_are_no_words() -> None:
    known, held = set(list_words(TRAIN)), set(list_words(HELD_OUT))
    tier, rng = get_tier("pretrain"), Random(0)
    written = [sample_word(tier, rng).words[0].text for _ in range(3000)]
    assert not held & set(written) and all(3 <= len(text) <= 8 and text.isalpha() for text in written)
    assert 0.5 < np.mean([text not in known for text in written]) < 0.7
    full = {sample_word(get_tier("full"), rng).words[0].text for _ in range(300)}
    assert not held & full and full - known


def test_patches_of_any_scene_agree_with_its_boxes() -> None:
    tier, rng = get_tier("pretrain"), Random(1)
    known = patches.build_vocabulary(tier.concepts)
    for _ in range(200):
        scene = sample_scene(tier, rng)
        name, kind, *_ = patches.label_patches(scene, 6, known)
        owners, bare = patches.find_owners(scene, 6)
        assert {known["name"][i] for i in name if i > 0} <= {t.concept.name for t in scene.things}
        assert ((name == 0) == bare.ravel()).all() and ((name > 0) == (owners.ravel() >= 0)).all()
        assert (kind[name <= 0] == patches.UNKNOWN).all()
        assert len(patches.write_raster(scene).split()) == 36
