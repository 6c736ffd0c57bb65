"""Tiles: which grid a picture gets, what lies where, and that every position is counted from the picture's own size."""

import re
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinyllava.commands.check_data import check_specs
from tinyllava.config import DataSpec
from tinyllava.data.collate import Collator
from tinyllava.data.dataset import build_dataset
from tinyllava.data.encode import Encoder
from tinyllava.data.images import open_image, read_image_size
from tinyllava.data.options import DataOptions
from tinyllava.data.sample import Sample, SampleError
from tinyllava.data.template import Template, image_token_id
from tinyllava.data.tiles import Tiles, count_image_tokens, count_views, find_best_grid, order_tokens, to_draft_size
from tinyllava.errors import UserError

EACH, SIDE = 5, 8  # positions of a view, and its pixels a side
TILES = Tiles(limit=4, side=SIDE)
SIZES = {"tall": (8, 24), "wide": (40, 10), "square": (20, 20), "small": (6, 7)}  # grids 3 x 1, 1 x 4, 2 x 2, 1 x 1
GRIDS = {"tall": (3, 1), "wide": (1, 4), "square": (2, 2), "small": (1, 1)}
COUNTS = {"tall": 23, "wide": 26, "square": 27, "small": 5}  # 5 x views + rows


def pixels(images, grids) -> torch.Tensor:
    """A model's processor in small: uint8 [views, 3, 8, 8]."""
    made = []
    for image, grid in zip(images, grids, strict=True):
        made += [image.resize((SIDE, SIDE)), *TILES.cut(image, grid)]
    return torch.from_numpy(np.stack([np.asarray(view) for view in made])).permute(0, 3, 1, 2)


@pytest.fixture
def shapes(tmp_path):
    """A folder with the pictures of SIZES; their red is a row, their green a column: 10 grey levels a pixel."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for name, (width, height) in SIZES.items():
        rows, columns = np.mgrid[:height, :width] * 250 // max(width, height)
        values = np.stack([rows, columns, np.full_like(rows, 7)], -1).astype(np.uint8)
        Image.fromarray(values).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def build(tokenizer, shapes):
    def build(path: str, streaming: bool = False, images=shapes, **options):
        defaults = {"template": Template.load("phi"), "tokens_per_image": EACH, "max_length": 1000, "pixels": pixels}
        spec = DataSpec(path=path, images=str(images), streaming=streaming)
        return build_dataset([spec], DataOptions(tokenizer=tokenizer, **{**defaults, "tiles": TILES, **options}))

    return build


@pytest.mark.parametrize(
    "size,side,limit,grid",
    [
        ((1024, 768), 384, 6, (2, 3)),
        ((768, 1024), 384, 6, (3, 2)),
        ((1024, 768), 384, 4, (2, 2)),
        ((1920, 1080), 384, 6, (2, 3)),
        ((1050, 1000), 384, 6, (2, 2)),  # not 2 x 3, which would stretch it by half
        ((4000, 4000), 384, 6, (2, 2)),
        ((3000, 1000), 384, 6, (1, 3)),
        ((640, 480), 384, 6, (2, 2)),
        ((300, 200), 384, 6, (1, 1)),
        ((543, 543), 384, 6, (1, 1)),  # two tiles a side need half their pixels
        ((544, 544), 384, 6, (2, 2)),
        ((1, 4000), 384, 6, (6, 1)),
        ((4000, 1), 384, 6, (1, 6)),
        ((1, 1), 384, 6, (1, 1)),
    ],
)
def test_the_grid_of_a_picture(size, side, limit, grid):
    assert find_best_grid(*size, side, limit) == grid


def test_the_grids_of_the_page_are_those_of_the_code():
    page = (Path(__file__).parents[2] / "docs" / "images.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) x (\d+) \| (.+) \| (.+) \| (.+) \|$", page, flags=re.M)
    assert len(rows) == 5
    for width, height, *cells in rows:
        for limit, cell in zip((4, 6, 12), cells, strict=True):
            grid = (1, 1) if cell == "-" else tuple(map(int, cell.split(" x ")))
            assert find_best_grid(int(width), int(height), 384, limit) == grid


def test_grids_have_no_more_tiles_than_allowed_turn_with_the_picture_and_grow_with_it():
    random = np.random.default_rng(0)
    for _ in range(300):
        width, height, limit = (int(n) for n in random.integers((1, 1, 2), (3000, 3000, 13)))
        rows, columns = find_best_grid(width, height, 224, limit)
        assert 1 <= rows * columns <= limit
        turned = find_best_grid(height, width, 224, limit)
        assert turned[0] * turned[1] == rows * columns
        larger = find_best_grid(2 * width, 2 * height, 224, limit)
        assert larger[0] * larger[1] >= rows * columns
        if width * height <= 224 * 224:
            wide = max(width, height) / min(width, height)
            assert rows * columns == 1 or wide > 2  # only what one view would squeeze out of shape


def test_tiles_are_the_picture_in_the_grid_s_pixels(shapes):
    image = open_image(str(shapes / "wide.png"))
    tiles = Tiles(6, SIDE).cut(image, (2, 3))
    rows = [np.concatenate([np.asarray(tile) for tile in tiles[start : start + 3]], axis=1) for start in (0, 3)]
    assert (np.concatenate(rows) == np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC))).all()
    assert TILES.cut(image, (1, 1)) == []
    for size in [(1, 4000), (4000, 1), (1, 1)]:
        thin = Image.new("RGB", size)
        assert {tile.size for tile in TILES.cut(thin, TILES.find_grid(size))} <= {(SIDE, SIDE)}


def test_tokens_lie_thumbnail_first_then_row_by_row_with_a_separator_after_each():
    grids = [(2, 2), (1, 1), (1, 3)]
    assert count_image_tokens(2, grids) == [12, 2, 9] and list(map(count_views, grids)) == [5, 1, 4]
    first, second, third = (order.tolist() for order in order_tokens(2, grids))
    assert first == [0, 1, *range(2, 6), 20, *range(6, 10), 20]
    assert second == [10, 11]
    assert third == [12, 13, *range(14, 20), 20]


def test_a_picture_s_size_is_that_of_the_upright_picture_however_it_is_given(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture = Image.new("RGB", (40, 10), (200, 0, 0))
    for name in ("a.jpg", "a.png", "a.webp"):
        picture.save(tmp_path / name, exif=exif)
        whole = (tmp_path / name).read_bytes()
        forms = [str(tmp_path / name), whole, {"bytes": whole, "path": None}, Image.open(tmp_path / name)]
        assert [read_image_size(form) for form in forms] == [(10, 40)] * 4 == [open_image(form).size for form in forms]
    assert read_image_size("a.jpg", [str(tmp_path)]) == (10, 40) and read_image_size(picture) == (40, 10)
    whole = (tmp_path / "a.png").read_bytes()
    start = whole.index(b"eXIf") - 4
    chunk = whole[start : start + 12 + int.from_bytes(whole[start : start + 4])]
    late = whole.replace(chunk, b"").replace(whole[-12:], chunk + whole[-12:])  # EXIF behind the pixels
    assert read_image_size(late) == (10, 40) == open_image(late).size
    picture.save(tmp_path / "plain.png")
    plain = (tmp_path / "plain.png").read_bytes()
    assert read_image_size(plain) == (40, 10)
    broken = plain[: plain.index(b"IDAT") + 8] + bytes(8) + plain[plain.index(b"IDAT") + 16 :]
    assert read_image_size(broken) == (40, 10)  # it was not decoded
    with pytest.raises(SampleError, match="cannot be decoded"):
        open_image(broken)
    with pytest.raises(SampleError, match=r"b\.jpg not found"):
        read_image_size("b.jpg", [str(tmp_path)])
    with pytest.raises(SampleError, match="is not an image") as error:
        read_image_size(b"nothing")
    assert error.value.kind == "unreadable_image"


def test_a_large_jpeg_is_decoded_at_a_size_that_still_fills_its_grid(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (800, 200)).save(tmp_path / "a.jpg", exif=exif)  # shown as 200 x 800
    grid = TILES.find_grid(read_image_size(str(tmp_path / "a.jpg")))
    assert grid == (4, 1) and to_draft_size(2 * SIDE, grid) == (16, 64)
    drafted = open_image(str(tmp_path / "a.jpg"), draft=to_draft_size(2 * SIDE, grid)).size
    assert drafted == (25, 100)  # an eighth


@pytest.fixture
def records(llava):
    return [
        llava("three", ["wide.png", "small.png", "tall.png"], ("<image>\na <image> or a <image>?", "the last")),
        llava("text", None, ("hi", "hello")),
        llava("rounds", ["square.png", "wide.png"], ("<image>\nwhat?", "a cat"), ("and\n<image>?", "a dog")),
        llava("one", "small.png", ("<image>\nwhat?", "a cat")),
    ]


def test_every_picture_takes_its_own_number_of_positions(build, write, records, tokenizer):
    data = build(write(records))
    template, image = Template.load("phi"), image_token_id(tokenizer)
    names = [["wide", "small", "tall"], [], ["square", "wide"], ["small"]]
    for i, shown in enumerate(names):
        item, counts = data[i], iter([COUNTS[name] for name in shown])
        encoded = template.encode(Sample.from_llava(records[i]), tokenizer)
        pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
        wanted = [pair for pair in pairs for _ in range(next(counts) if pair[0] == image else 1)]
        assert item["input_ids"].tolist() == [token for token, _ in wanted]
        assert item["labels"].tolist() == [label for _, label in wanted]
        assert data.lengths[i] == len(wanted)
        if not shown:
            assert item["pixel_values"] is None and "image_grids" not in item
            continue
        assert item["image_grids"].tolist() == [list(GRIDS[name]) for name in shown]
        assert len(item["pixel_values"]) == sum(count_views(GRIDS[name]) for name in shown)
    wide = data[0]["pixel_values"][:5].float().mean(dim=(2, 3))  # its thumbnail, then four columns from left to right
    assert (wide[1:, 1].diff() > 20).all() and abs(wide[0, 1] - wide[1:, 1].mean()) < 5


def test_a_batch_has_the_views_and_grids_of_all_its_pictures(build, write, records):
    data = build(write(records))
    batch = Collator(0)([data[2], data[1], data[0]])
    assert batch["image_grids"].tolist() == [[2, 2], [1, 4], [1, 4], [1, 1], [3, 1]]
    assert len(batch["pixel_values"]) == 5 + 5 + 5 + 1 + 4
    assert "image_grids" not in Collator(0)([data[1]])


def test_a_stream_gives_the_same_items(build, write, records):
    mapped, streamed = build(write(records)), build(write(records, "data.jsonl"), streaming=True)
    wanted = {tuple(item["input_ids"].tolist()): item for item in (mapped[i] for i in range(4))}
    found = {tuple(item["input_ids"].tolist()): item for item in islice(streamed, 4)}  # in an order of its own
    assert wanted.keys() == found.keys() and len(found) == 4
    for ids, item in found.items():
        assert item.keys() == wanted[ids].keys() | {"id"}
        for key in set(item) - {"index", "id"}:
            assert (item[key] is None and wanted[ids][key] is None) or torch.equal(item[key], wanted[ids][key]), key


def test_what_is_too_long_loses_rounds_by_its_pictures_real_lengths_and_never_a_part_of_one(
    build, write, records, tokenizer, shapes
):
    def encoder(max_length: int) -> Encoder:
        return Encoder(DataOptions(Template.load("phi"), tokenizer, EACH, pixels, max_length, tiles=TILES))

    sample, roots = Sample.from_llava(records[2]), [str(shapes)]
    whole = encoder(1000).encode(sample, roots)
    assert whole["length"] == len(whole["input_ids"]) - 2 + COUNTS["square"] + COUNTS["wide"]
    cut = encoder(whole["length"] - 1).encode(sample, roots)
    assert cut["shortened"] and cut["images"] == ["square.png"] and cut["grids"] == [[2, 2]]
    assert cut["length"] == len(cut["input_ids"]) - 1 + COUNTS["square"]
    assert encoder(cut["length"]).encode(sample, roots) == cut
    with pytest.raises(SampleError, match=rf"{whole['length']} positions \(27 \+ 26 for images\).*first round alone"):
        encoder(cut["length"] - 1).encode(sample, roots)


def test_pictures_are_measured_when_tokenised_and_only_with_tiles(build, write, llava, folder, shapes):
    shutil.copy(folder / "empty.jpg", shapes / "empty.jpg")
    (shapes / "words.jpg").write_text("no picture")
    asked = ("<image>\nwhat?", "a cat")
    path = write(
        [llava("words", "words.jpg", asked), llava("zero", "empty.jpg", asked), llava("s", "small.png", asked)]
    )
    with pytest.raises(UserError, match=r"2 unreadable_image \(words, zero\)"):
        build(path)
    assert build(path, on_bad_sample="skip").bad_records.to_dict()["unreadable_image"]["count"] == 2
    plain = build(path, tiles=None, on_bad_sample="skip", pixels=lambda images: pixels(images, [(1, 1)] * len(images)))
    assert len(plain) == 2  # only its first decoding finds `words` out
    assert "image_grids" not in plain[1] and plain.lengths[1] == build(path, on_bad_sample="skip").lengths[0]


def test_a_picture_that_was_missing_is_measured_when_it_has_come(build, write, llava, shapes):
    path = write([llava("w", "wide.png", ("<image>\nwhat?", "a cat")), llava("t", None, ("hi", "hello"))])
    (shapes / "wide.png").rename(shapes / "away.png")
    with pytest.raises(UserError, match=r"1 missing_image \(w\)"):
        build(path)
    (shapes / "away.png").rename(shapes / "wide.png")
    assert build(path)[0]["image_grids"].tolist() == [[1, 4]]


def test_prepared_rows_are_kept_for_the_same_tiles_and_folder_alone(build, write, records, shapes, tmp_path, cache):
    path = write(records)

    def kept() -> int:
        return len(list((cache / "tokenised").glob("*.arrow")))

    first = build(path)
    assert build(path).fingerprint == first.fingerprint and kept() == 1
    other = build(path, tiles=Tiles(2, SIDE))
    assert other.fingerprint != first.fingerprint and other.lengths[0] < first.lengths[0] and kept() == 2
    shutil.copytree(shapes, tmp_path / "again")
    Image.new("RGB", (6, 7)).save(tmp_path / "again" / "wide.png")
    moved = build(path, images=tmp_path / "again")
    assert moved[0]["image_grids"][0].tolist() == [1, 1] and kept() == 3


def test_a_picture_that_breaks_in_training_keeps_the_shape_that_was_planned(build, write, llava, folder, shapes):
    shutil.copy(folder / "broken.jpg", shapes / "broken.jpg")  # 64 x 64 by its header
    data = build(write([llava("b", "broken.jpg", ("<image>\nwhat?", "a cat"))]), on_bad_sample="skip")
    item = data[0]
    assert item["skipped"] and len(item["pixel_values"]) == 5 and item["image_grids"].tolist() == [[2, 2]]
    assert (item["labels"] == -100).all() and len(item["input_ids"]) == data.lengths[0]


def test_check_counts_lengths_with_tiles_and_names_a_bad_picture_once(write, llava, folder, tokenizer):
    asked = ("<image>\nwhat?", "a cat")
    path = write([llava("a", "red.jpg", asked), llava("b", "gone.jpg", asked), llava("c", "empty.jpg", asked)])
    spec = DataSpec(path=path, images=str(folder))
    options = DataOptions(Template.load("phi"), tokenizer, EACH, pixels, max_length=1000, tiles=TILES)
    report = check_specs([spec], options, progress=False)
    ids = {kind: entry["ids"] for kind, entry in report.bad_records.to_dict().items()}
    assert ids == {"missing_image": ["b"], "unreadable_image": ["c"]}
    short = check_specs([spec], replace(options, max_length=30), progress=False)
    assert short.bad_records.to_dict()["too_long"]["count"] == 1
