"""Every mode and orientation of Pillow becomes the upright RGB image that a person sees."""

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tinyllava.data.images import open_image, read_image_size
from tinyllava.data.sample import SampleError

RAMP = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
GREY = Image.fromarray(RAMP)
COLOUR = Image.fromarray(np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 90)], axis=-1))
HALF = RAMP >= 128  # the right half is opaque
ALPHA = Image.fromarray(np.where(HALF, 255, 0).astype(np.uint8))
SHORT = {"I;16": "<u2", "I;16L": "<u2", "I;16N": "=u2", "I;16B": ">u2"}


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def to_array(image: Any) -> np.ndarray:
    opened = open_image(image)
    assert opened.mode == "RGB"
    return np.asarray(opened).astype(int)


def differ(image: Any, expected: Image.Image | np.ndarray) -> int:
    """The largest difference of a pixel."""
    return int(np.abs(to_array(image) - np.asarray(expected, dtype=int)).max())


def with_alpha(image: Image.Image, alpha: Image.Image = ALPHA) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(alpha)
    return image


ON_WHITE = np.where(HALF[..., None], np.asarray(COLOUR), 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"])
def test_colour_modes(mode: str) -> None:
    assert differ(COLOUR.convert(mode), COLOUR) <= {"YCbCr": 3, "HSV": 6}.get(mode, 0)


@pytest.mark.parametrize("mode", ["L", "LA", "La", "P", "I", "F"])
def test_grey_modes(mode: str) -> None:
    image = GREY.convert("LA").convert(mode) if mode == "La" else GREY.convert(mode)
    assert differ(image, GREY.convert("RGB")) == 0


@pytest.mark.parametrize("mode", SHORT)
def test_16_bits_in_any_byte_order(mode: str) -> None:
    image = Image.frombytes(mode, GREY.size, (RAMP.astype(SHORT[mode]) * 257).astype(SHORT[mode]).tobytes())
    assert differ(image, GREY.convert("RGB")) == 0
    assert differ(image.transpose(Image.Transpose.ROTATE_90), GREY.convert("RGB").rotate(90, expand=True)) == 0


def test_other_modes() -> None:
    bits = Image.fromarray(RAMP > 100)
    assert bits.mode == "1" and set(to_array(bits).ravel()) == {0, 255}
    assert to_array(Image.new("LAB", (2, 2), (255, 128, 128))).min() > 250  # the lightest is white
    palette = COLOUR.quantize(256)
    assert differ(palette, palette.convert("RGB")) == 0
    assert differ(encode(COLOUR.convert("CMYK"), "JPEG", quality=100), COLOUR) < 12  # Adobe's, inverted in the file


@pytest.mark.parametrize("kind", ["PIL", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "TGA", "QOI"])
def test_transparent_images_are_shown_on_white(kind: str) -> None:
    image = with_alpha(COLOUR)
    exact = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
    stored = image if kind == "PIL" else encode(image, kind, **exact)
    assert (to_array(stored)[~HALF] >= 254).all()
    assert differ(stored, ON_WHITE) <= {"GIF": 40, "AVIF": 3}.get(kind, 0)
    assert differ(image.convert("RGBa"), ON_WHITE) == 0


def test_half_transparent_ink_is_mixed_with_white() -> None:
    ink = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert (to_array(ink) == 127).all() and (to_array(encode(ink, "PNG")) == 127).all()
    assert (to_array(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == 255).all()  # dark ink, as diagrams have it
    assert (to_array(Image.new("LA", (4, 4), (0, 128))) == 127).all()


def test_grey_and_palette_transparency() -> None:
    grey = GREY.convert("LA")
    grey.putalpha(ALPHA)
    expected = np.where(HALF, RAMP, 255)[..., None].repeat(3, axis=-1)
    for image in (grey, grey.convert("La"), encode(grey, "PNG")):
        assert differ(image, expected) == 0
    palette = Image.new("PA", GREY.size)  # all black
    palette.putalpha(ALPHA)
    assert differ(palette, np.where(HALF, 0, 255)[..., None].repeat(3, axis=-1)) == 0
    several = with_alpha(COLOUR).quantize(16)  # a palette with an alpha value for each entry
    assert (to_array(encode(several, "PNG"))[~HALF] == 255).all()


@pytest.mark.parametrize(
    ("image", "kind", "clear"),
    [
        (GREY, "PNG", 0),
        (COLOUR, "PNG", (0, 255, 90)),
        (Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG", 0),
        (Image.fromarray(RAMP > 0), "PNG", 0),
        (Image.fromarray(RAMP // 128).convert("P"), "PNG", 0),
        (Image.fromarray(RAMP // 128).convert("P"), "GIF", 0),
    ],
    ids=["grey", "colour", "16 bits", "1 bit", "palette", "gif"],
)
def test_one_transparent_colour(image: Image.Image, kind: str, clear: Any) -> None:
    opened = to_array(encode(image, kind, transparency=clear))
    assert (opened[:, 0] == 255).all()  # it was the darkest


@pytest.mark.filterwarnings("ignore")
def test_images_that_were_converted_by_the_user_are_shown() -> None:
    stored = encode(COLOUR, "PNG", transparency=(0, 255, 90))
    for mode in ("1", "L", "I", "I;16", "F", "P", "RGBA", "CMYK", "YCbCr", "HSV"):
        image = Image.open(io.BytesIO(stored)).convert(mode)  # it may keep the transparent colour of the old mode
        assert open_image(image).size == COLOUR.size


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_the_first_of_several_frames_is_shown(kind: str) -> None:
    red, green = (Image.new("RGB", (64, 48), colour) for colour in ((255, 0, 0), (0, 255, 0)))
    assert differ(encode(red, kind, save_all=True, append_images=[green]), red) <= 3


def test_16_bits_a_channel() -> None:
    values = np.linspace(0, 65535, 64, dtype=">u2").repeat(3).reshape(1, 64, 3)
    header = struct.pack(">IIBBBBB", 64, 1, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + values.tobytes())), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts]
    assert differ(b"\x89PNG\r\n\x1a\n" + b"".join(chunks), values.astype(int) / 257) <= 1


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("kind", ["PIL", "TIFF", "PNG"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_pictures_of_any_number_of_bits_keep_their_contrast(dtype: type, kind: str, bits: int) -> None:
    ramp = np.linspace(0, 2**bits - 1, 64).astype(dtype).reshape(1, -1)
    if kind == "PNG" and dtype is not np.uint16:
        return
    image = Image.fromarray(ramp)
    expected = np.linspace(0, 255, 64)[None, :, None]
    assert differ(image if kind == "PIL" else encode(image, kind), expected) <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 1000, 4095], np.uint16), (0, 62, 255)),  # 12 bits in 16
        (np.array([0, 2048, 3000], np.uint16), (0, 128, 187)),  # not stretched: its white is that of 12 bits
        (np.array([0, 32768, 32768], np.uint16), (0, 128, 128)),
        (np.array([0, 1, 2], np.int32), (0, 85, 170)),  # the numbers of a mask can be told apart
        (np.array([-1000, 0, 3000], np.int32), (0, 64, 255)),  # X-ray attenuation
        (np.array([0, 500_000, 1_000_000], np.int32), (0, 128, 255)),
        (np.array([0.0, 0.25, 0.75], np.float32), (0, 64, 191)),  # shares of one
        (np.array([0.0, 0.005, 0.01], np.float32), (0, 128, 255)),
        (np.array([0.5, 1.75, 3.0], np.float32), (0, 128, 255)),  # metres
        (np.array([-1.0, 0.0, 1.0], np.float32), (0, 128, 255)),
        (np.array([1e30, 2e30, 3e30], np.float32), (0, 128, 255)),
        (np.array([7.5, 7.5, 7.5], np.float32), (128, 128, 128)),
        (np.array([-7, -7, -7], np.int32), (128, 128, 128)),
        (np.array([0, 0, 0], np.uint16), (0, 0, 0)),
        (np.array([1.0, 1.0, 1.0], np.float32), (255, 255, 255)),
    ],
)
def test_values_are_scaled_by_their_range(values: np.ndarray, expected: tuple[int, ...]) -> None:
    image = Image.fromarray(values.reshape(1, -1))
    assert to_array(image)[0, :, 0].tolist() == list(expected)
    assert to_array(encode(image, "TIFF"))[0, :, 0].tolist() == list(expected)


def make_deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel: values [H, W, C] with two (LA), three or four channels."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_colours_of_16_bits_are_shown_or_refused_but_never_black(channels: int, bits: int) -> None:
    """Pillow keeps the upper 8 of 16 bits."""
    values = np.repeat((RAMP.astype(int) * (2**bits - 1) // 255)[..., None], channels, axis=2)
    opaque = values.copy()
    opaque[..., -1] = 65535  # alpha
    for picture in [values] if channels == 3 else [values, opaque]:
        if bits < 16:
            if picture is opaque and bits == 8:
                continue  # as black ink on a transparent ground
            with pytest.raises(SampleError, match="16 bits, but use only the lower 12"):
                open_image(make_deep_png(picture))
        elif picture is opaque or channels == 3:
            assert differ(make_deep_png(picture), np.repeat(RAMP[..., None], 3, axis=2)) == 0
    if channels != 3:
        ink = np.zeros((8, 256, channels), dtype=int)
        ink[..., -1] = (255 - RAMP.astype(int)) * 257
        assert differ(make_deep_png(ink), np.repeat(RAMP[..., None], 3, axis=2)) <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_without_a_range_are_refused(value: float) -> None:
    image = Image.fromarray(np.array([[0.0, value, 1.0]], np.float32))
    with pytest.raises(SampleError, match="NaN or infinite") as error:
        open_image(image)
    assert error.value.kind == "unreadable_image"


def test_a_pil_image_is_not_changed() -> None:
    for image in (COLOUR.copy(), with_alpha(COLOUR)):
        before = image.tobytes()
        open_image(image).putpixel((0, 0), (1, 2, 3))
        assert image.tobytes() == before


# --- orientation ---

MARKED = Image.new("RGB", (48, 32), (0, 0, 250))
MARKED.paste((250, 0, 0), (0, 0, 16, 16))  # one corner


def make_exif(orientation: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535])
def test_the_size_in_the_header_is_that_of_the_upright_image(kind: str, orientation: int) -> None:
    exact = {"JPEG": {"quality": 100}, "AVIF": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    content = encode(MARKED, kind, exif=make_exif(orientation), **exact)
    lazy, loaded = Image.open(io.BytesIO(content)), Image.open(io.BytesIO(content))
    loaded.load()
    upright = MARKED.copy()
    upright.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(upright)
    for form in (content, lazy, lazy, loaded):
        assert read_image_size(form) == upright.size
        assert open_image(form).size == upright.size
        assert np.abs(to_array(form) - np.asarray(upright, dtype=int)).mean() < 12  # 55 if it is turned otherwise
    width, height = open_image(content, draft=(upright.width // 2, upright.height // 2)).size
    assert (width > height) == (upright.width > upright.height)


def test_xmp_and_text_chunks_turn_an_image_too() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for kind in ("JPEG", "WEBP", "TIFF", "AVIF"):
        content = encode(MARKED, kind, **({"tiffinfo": {700: xmp}} if kind == "TIFF" else {"xmp": xmp}))
        assert read_image_size(content) == open_image(content).size == (32, 48), kind
    plain = encode(MARKED, "PNG")
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    raw = make_exif(6).tobytes()
    hexed = b"Raw profile type exif\0\nexif\n" + b"%8d\n" % len(raw) + raw.hex().encode()
    for name, body in ((b"iTXt", text), (b"tEXt", hexed), (b"eXIf", raw[6:])):
        chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for at in (33, len(plain) - 12):  # after the header, or after the pixels
            content = plain[:at] + chunk + plain[at:]
            assert read_image_size(content) == open_image(content).size == (32, 48), (name, at)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_damaged_exif_leaves_the_image_as_it_is(kind: str, exif: bytes) -> None:
    content = encode(MARKED, kind, exif=exif)
    image = Image.open(io.BytesIO(content))
    for form in (content, image, image):
        assert read_image_size(form) == open_image(form).size == MARKED.size


@pytest.mark.filterwarnings("ignore")
def test_header_and_pixels_agree_on_damaged_files() -> None:
    rng = random.Random(0)
    seeds = [encode(MARKED, kind, exif=make_exif(6)) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO")]
    agreed = 0
    for content in seeds * 40:
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 2, 5))):
            damaged[rng.randrange(min(400, len(damaged)))] = rng.choice((0, 255, rng.randrange(256)))
        try:
            size = open_image(bytes(damaged)).size
        except SampleError:
            continue
        assert read_image_size(bytes(damaged)) == size
        agreed += 1
    assert agreed > 50


# --- limits ---


def test_only_known_formats_are_opened() -> None:
    postscript = encode(MARKED, "EPS")
    assert Image.open(io.BytesIO(postscript)).format == "EPS"
    with pytest.raises(SampleError, match=r"is not an image of a known format \(JPEG, PNG"):
        open_image(postscript)


def test_a_small_file_of_very_many_pixels_is_refused() -> None:
    huge = encode(Image.new("1", (12_000, 8_000)), "PNG")
    assert len(huge) < 50_000
    for call in (open_image, read_image_size):
        with pytest.raises(SampleError, match=r"cannot be decoded \(Image size \(96000000 pixels\) exceeds limit"):
            call(huge)
