"""Image files with a few bytes changed, headers that announce huge sizes, and odd references."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz import harness
from tests.fuzz.harness import Case
from tests.fuzz.mutate import SCALARS, TEXTS, edit_bytes, edit_trees, make_values
from tests.image_forms import list_text_forms
from tinyllava.data.images import ImageFolders, open_image, read_image_size
from tinyllava.data.references import describe_reference

GREY = Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 24), dtype=np.uint8))
COLOUR = Image.merge("RGB", [GREY, GREY.transpose(Image.Transpose.FLIP_TOP_BOTTOM), GREY])
# Pillow writes them, and an image may have any of these forms; the last ones are formats that we do not read.
FORMS: list[tuple[str, Image.Image, dict[str, Any]]] = [
    *[("PNG", COLOUR.convert(mode), {}) for mode in ("RGB", "L", "P", "RGBA", "1", "LA", "I", "I;16")],
    *[("JPEG", COLOUR.convert(mode), {}) for mode in ("RGB", "L", "CMYK")],
    ("JPEG", COLOUR, {"progressive": True, "quality": 30}),
    ("GIF", COLOUR.convert("P"), {}),
    ("GIF", COLOUR.convert("P"), {"save_all": True, "append_images": [GREY.convert("P")], "transparency": 3}),
    ("WEBP", COLOUR, {}),
    ("WEBP", COLOUR.convert("RGBA"), {"lossless": True}),
    *[("BMP", COLOUR.convert(mode), {}) for mode in ("RGB", "L", "1", "P", "RGBA")],
    *[("TIFF", COLOUR, {"compression": name}) for name in ("raw", "tiff_lzw", "jpeg", "tiff_deflate", "packbits")],
    *[("TIFF", COLOUR.convert(mode), {}) for mode in ("I;16", "F", "1", "CMYK", "LAB", "P", "RGBA")],
    ("ICO", COLOUR, {}),
    ("ICO", COLOUR, {"bitmap_format": "bmp"}),
    *[("PPM", COLOUR.convert(mode), {}) for mode in ("RGB", "L", "1", "I")],
    *[
        ("TGA", COLOUR.convert(mode), {"compression": name})
        for mode in ("RGB", "P", "RGBA")
        for name in ("tga_rle", None)
    ],
    *[("JPEG2000", COLOUR.convert(mode), {}) for mode in ("RGB", "L", "RGBA")],
    ("JPEG2000", COLOUR, {"no_jp2": True}),
    ("AVIF", COLOUR, {}),
    ("QOI", COLOUR, {}),
    *[(name, COLOUR, {}) for name in ("DDS", "SGI", "PCX", "IM", "ICNS", "PDF", "EPS")],
    *[(name, COLOUR.convert("1"), {}) for name in ("MSP", "XBM")],
    ("SPIDER", COLOUR.convert("F"), {}),
]
KEYS = ["bytes", "image", "image_url", "url", "path", "source", "base64", "data", "type", "media_type", "detail"]


def write_seeds() -> list[bytes]:
    exif = Image.Exif()
    exif[274] = 6
    seeds = []
    for name, image, options in FORMS:
        for more in ({}, {"exif": exif}) if name in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else ({},):
            stream = io.BytesIO()
            image.save(stream, name, **options, **more)
            seeds.append(stream.getvalue())
    png = seeds[0]
    huge = png[:8] + _make_chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)) + png[33:]
    bomb = png[:8] + _make_chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 8, 0, 0, 0, 0))
    bomb += _make_chunk(b"IDAT", zlib.compress(bytes(12_001 * 1000))) + _make_chunk(b"IEND", b"")
    text = png[:-12] + _make_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24))) + png[-12:]
    return [*seeds, huge, bomb, text, b"P6 99999 99999 255\n", b"P6 60000 60000 65535\n" + bytes(64), b"", b"\xff\xd8"]


def _make_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def build(folder: Path) -> list[Case]:
    # The largest image that is allowed has 89 million pixels of 4 bytes, and a transparent one is copied five times.
    harness.GROWTH = 2 << 30
    seeds = write_seeds()
    roots = ImageFolders([str(folder)])
    drafts = st.sampled_from([None, (8, 8), (1, 1), (384, 384)])
    (folder / "a.png").write_bytes(seeds[0])
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to("link.png")
    forms = [*list_text_forms(folder / "a.png").values(), "a.png", "folder.png", "link.png", "empty.png", b"", seeds[0]]
    arrays = [np.zeros((2, 3, 3)), np.zeros(0, np.uint8), np.array(None), np.zeros((1, 1, 2), np.uint8)]

    def open_bytes(input: tuple[bytes, tuple[int, int] | None]) -> None:
        image = open_image(input[0], draft=input[1])
        assert image.mode == "RGB", image.mode

    def measure(data: bytes) -> None:
        size = read_image_size(data)
        assert min(size) > 0, size

    def open_reference(reference: Any) -> None:
        assert describe_reference(reference).isprintable()
        open_image(reference, roots)

    odd = st.one_of(
        edit_trees(forms, st.one_of(make_values(KEYS), st.binary(max_size=9))),
        TEXTS,
        SCALARS,
        st.integers(0, 3).map(arrays.__getitem__),
    )
    return [
        Case("images: open", st.tuples(edit_bytes(seeds), drafts), open_bytes),
        Case("images: size", edit_bytes(seeds), measure),
        Case("images: references", odd, open_reference),
    ]
