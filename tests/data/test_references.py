"""Every form of an image gives the same pixels, everywhere; no error prints the content of an image."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.image_forms import IMAGE, PIXELS, PNG, encode, list_python_forms, list_text_forms, make_record
from tinyllava.config import DataSpec
from tinyllava.data.dataset import build_dataset
from tinyllava.data.images import open_image, read_image_size
from tinyllava.data.options import DataOptions
from tinyllava.data.references import is_file_reference, resolve_reference
from tinyllava.data.sample import Sample, SampleError
from tinyllava.data.sources import open_source
from tinyllava.data.template import Template
from tinyllava.infer.prompts import make_image_key

BIG = "A" * 100_000  # the content of a broken image


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "my set").mkdir()
    found = tmp_path / "my set" / "a cat & 100% ü#1.png"
    found.write_bytes(PNG)
    return found


def test_every_form_gives_the_same_pixels(path: Path) -> None:
    for name, form in [*list_text_forms(path).items(), *list_python_forms(path).items()]:
        for _ in range(2):  # an open file can be read again
            assert np.array_equal(open_image(form), PIXELS), name
            assert read_image_size(form) == IMAGE.size, name
            assert make_image_key(form)[0] in ("file", "bytes", "pixels"), name
        (image,) = Sample.from_messages(make_record(form)).images
        assert np.array_equal(open_image(image), PIXELS), name


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000"])
def test_base64_is_known_by_what_a_file_of_each_format_begins_with(kind: str) -> None:
    content = encode(IMAGE, kind)
    for text in (base64.b64encode(content).decode(), base64.urlsafe_b64encode(content).decode()):
        assert resolve_reference(text) == content and not is_file_reference(text)


@pytest.mark.parametrize(
    "name", ["Qk2xL5a9ZkQ3vTgYb7WcR1eNfUoJd8sH.jpg", "data/1.png", "9j/4AAQSkZJRgABAQAAAQABAAD.jpg"]
)
def test_a_random_file_name_is_not_taken_for_base64(name: str) -> None:
    assert is_file_reference(name) and resolve_reference(name) == name


def test_grey_and_one_channel_arrays_are_images(path: Path) -> None:
    grey = PIXELS[..., 0]
    for array in (grey, grey[..., None]):
        assert np.array_equal(open_image(array), np.dstack([grey] * 3))


def test_records_of_a_file_take_every_form_that_json_has(
    path: Path, write: Callable, llava: Callable, tokenizer: Any
) -> None:
    forms = list_text_forms(path)
    parts = [{"id": name, **make_record(form)} for name, form in forms.items()]
    fields = [llava(name, form, ("<image>\nwhat?", "a cat")) for name, form in forms.items()]
    seen: list[Any] = []

    def pixels(images: list[Image.Image]) -> Any:
        seen.extend(images)
        return np.zeros(1)

    specs = [DataSpec(path=write(parts, "a.jsonl")), DataSpec(path=write(fields, "b.json"))]
    dataset = build_dataset(specs, DataOptions(Template.load("llama"), tokenizer, 9, pixels, max_length=500))
    assert len(dataset) == 2 * len(forms)
    for index in range(len(dataset)):
        dataset[index]
        assert np.array_equal(seen[index], PIXELS), dataset.ids[index]


def test_relative_paths_and_files_start_at_the_image_folder(path: Path, write: Callable, llava: Callable) -> None:
    (path.parent / "x.png").write_bytes(PNG)
    (path.parent / "link.png").symlink_to(path)
    outside = path.parent.parent / "secret.png"
    outside.write_bytes(PNG)
    (path.parent / "inner").mkdir()
    inside = ["x.png", "file:x.png", "file://x.png", "./x.png", "inner/../x.png", "link.png", str(path), path.as_uri()]
    out = [
        "../secret.png",
        "inner/../../secret.png",
        str(outside),
        outside.as_uri(),
        f"file://{path.parent}/../secret.png",
    ]
    records = [llava(name, name, ("<image>\nwhat?", "a cat")) for name in inside + out]
    named = open_source(DataSpec(path=write(records), images=str(path.parent)))
    for name in inside:
        assert np.array_equal(open_image(name, named.roots), PIXELS), name
    for name in out:
        with pytest.raises(SampleError, match=r"secret\.png not found under .*my set") as error:
            open_image(name, named.roots)
        assert error.value.kind == "missing_image"
    beside = open_source(DataSpec(path=write(records)))  # no folder is named: records are as free as a path of Python
    assert np.array_equal(open_image(str(outside), beside.roots), PIXELS)
    with pytest.raises(SampleError, match="Only base64"):  # base64 is never a path
        open_image({"type": "image", "source": {"type": "base64", "data": "../secret.png"}}, beside.roots)


class Strange:
    pass


CLOSED = io.BytesIO(PNG)
CLOSED.close()
BROKEN = {
    "data": f"data:image/png;base64,{BIG}",
    "data, not base64": f"data:image/png;base64,{BIG}!",
    "data, no comma": f"data:image/png;base64{BIG}",
    "data, a surrogate": f"data:image/png;base64,\ud83d{BIG}",
    "base64": f"iVBORw0KGgo{BIG}",
    "base64, not base64": f"iVBORw0KGgo{BIG}!",
    "base64 as bytes": f"iVBORw0KGgo{BIG}".encode(),
    "text": BIG,
    "lines": "AAAA\n" * 20_000,
    "escapes": "\x1b[31mAAAA" * 10_000,
    "path": "/AAAA" * 20_000,
    "file": f"file:///{BIG}",
    "http": f"http://{BIG}",
    "http, a space": f"http://localhost:1/a b{BIG}",
    "bytes": BIG.encode(),
    "bytearray": bytearray(BIG.encode()),
    "BytesIO": io.BytesIO(BIG.encode()),
    "StringIO": io.StringIO(BIG),
    "closed file": CLOSED,
    "datasets": {"bytes": BIG.encode(), "path": None},
    "datasets, path": {"bytes": None, "path": BIG},
    "datasets, both": {"bytes": b"AAAA", "path": BIG},
    "OpenAI": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BIG}"}},
    "Responses": {"type": "input_image", "file_id": BIG},
    "Anthropic": {"type": "image", "source": {"type": "base64", "data": BIG}},
    "keys": {BIG: 1},
    "list": [65] * 100_000,
    "float array": np.full((200, 200, 3), 65.0),
    "channels first": np.full((3, 200, 200), 65, np.uint8),
    "two channels": np.full((200, 200, 2), 65, np.uint8),
    "empty array": np.zeros((0, 4, 3), np.uint8),
    "a line of pixels": np.zeros(5, np.uint8),
    "uint16 array": np.full((20, 20), 65, np.uint16),
    "objects": np.array([BIG] * 3, dtype=object),
    "none": None,
    "number": 65,
    "another class": Strange(),
}


@pytest.mark.parametrize("form", BROKEN.values(), ids=BROKEN)
def test_an_error_never_prints_the_image(form: Any) -> None:
    def refuse(call: Callable, *arguments: Any) -> None:
        with pytest.raises(SampleError) as error:
            call(*arguments)
        assert len(str(error.value)) < 300 and "\n" not in str(error.value) and "\x1b" not in str(error.value)
        assert "A" * 70 not in str(error.value) and "65, 65" not in str(error.value)
        assert error.value.kind in ("missing_image", "unreadable_image")

    refuse(open_image, form)
    refuse(read_image_size, form, ["pictures"])
    if Sample.from_messages(make_record(form)).images:
        refuse(lambda: open_image(Sample.from_messages(make_record(form)).images[0]))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (np.zeros((4, 4, 3)), r"expected uint8 \[H, W\] .*, found float64 \[4, 4, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"found uint8 \[3, 8, 8\]"),
        (Strange(), "of type Strange cannot be read .*expected a path, a URL, base64, bytes"),
        (BIG.encode(), "image of 100,000 bytes is not an image of a known format"),
        (f"data:image/png;base64,{BIG}", r"image data:image/png;base64,A+\.\.\. \(100,022 characters\) is not"),
        ({"bytes": b"no", "path": "cat.png"}, "image of 2 bytes is not an image"),
        (b"", "image of 0 bytes is not an image"),
    ],
)
def test_an_error_says_what_was_found(form: Any, text: str) -> None:
    with pytest.raises(SampleError, match=text):
        open_image(form)


def test_keys_of_pil_images_are_those_of_what_is_seen() -> None:
    indices = Image.fromarray(PIXELS[..., 0] % 2).convert("P")
    black, red = indices.copy(), indices.copy()
    black.putpalette([0, 0, 0, 255, 255, 255])
    red.putpalette([250, 0, 0, 255, 255, 255])
    assert make_image_key(black) != make_image_key(red)  # the same indices
    turned = IMAGE.copy()
    turned.getexif()[0x0112] = 3
    assert make_image_key(turned) != make_image_key(IMAGE) == make_image_key(PIXELS)
