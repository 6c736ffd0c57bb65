"""Pools and batches: nothing lost, nothing twice, pictures together, lengths together."""

import random
from itertools import pairwise

import pytest
from PIL import Image

from tinyllava.infer import prompts
from tinyllava.infer.prompts import Prompt, make_batches, make_image_key, make_pools


@pytest.mark.parametrize("seed", range(5))
def test_pools_keep_pictures_together(seed: int, monkeypatch) -> None:
    monkeypatch.setattr(prompts, "POOL", 10)
    rng = random.Random(seed)
    keys = [rng.choice([(), (("file", rng.randint(0, 30)),)]) for _ in range(200)]
    made = list(make_pools(keys, images=4))
    assert sorted(index for pool in made for index in pool) == list(range(200))
    shown = [{key for index in pool for key in keys[index]} for pool in made]
    assert max(map(len, shown)) <= 4 and max(map(len, made)) <= 10
    for number in range(31):  # a picture's questions are in one pool, or in neighbouring ones if they are too many
        where = [at for at, pool in enumerate(shown) if ("file", number) in pool]
        count = sum(keys[index] == (("file", number),) for pool in made for index in pool)
        assert where == list(range(where[0], where[0] + len(where))) if where else not count
        assert len(where) <= 1 or count > 10


def test_a_batch_has_similar_lengths_and_one_limit() -> None:
    rng = random.Random(0)
    asked = {index: Prompt([0] * rng.randint(1, 3000), []) for index in range(100)}
    made = list(make_batches(asked, dict.fromkeys(asked, 8)))
    assert sorted(index for batch in made for index in batch) == list(range(100))
    lengths = [[asked[index].length for index in batch] for batch in made]
    assert lengths == sorted(lengths, key=max, reverse=True)
    assert all(len(batch) * max(batch) <= prompts.POSITIONS and len(batch) <= prompts.ROWS for batch in lengths)
    assert all(max(b) <= min(a) for a, b in pairwise(lengths))
    limits = {index: 8 if index % 3 else 5 for index in asked}
    assert all(len({limits[index] for index in batch}) == 1 for batch in make_batches(asked, limits, 7))
    assert [len(batch) for batch in make_batches(asked, dict.fromkeys(asked, 8), 30)] == [30, 30, 30, 10]
    assert list(make_batches({0: Prompt([0] * 10**6, [])}, {0: 8})) == [[0]]  # too long for any batch, and still asked


def test_keys_tell_pictures_apart(tmp_path) -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    path = tmp_path / "a.png"
    red.save(path)
    before = make_image_key(str(path))
    assert make_image_key({"path": str(path)}) == before
    assert make_image_key(red) == make_image_key(red.copy()) != make_image_key(blue)
    assert make_image_key(b"1") == make_image_key({"bytes": b"1", "path": "x"}) != make_image_key(b"2")
    assert make_image_key("https://x/a.png") == ("url", "https://x/a.png")
    Image.new("RGB", (400, 400), "blue").save(path)
    assert make_image_key(str(path)) != before
    assert make_image_key("nowhere.png") == ("missing", "nowhere.png")
