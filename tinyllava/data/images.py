"""Pictures: from whatever a record holds to an upright RGB picture, or an error that names it.

A reference is a path (looked for in several folders), an http(s) or data: URL, bytes, the Hub's {"bytes", "path"}, or a
PIL picture. EXIF rotation is applied, as transformers' `load_image` does: training sees what serving sees.
"""

import base64
import binascii
import io
import os
import struct
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from tinyllava.data.sample import SampleError

if TYPE_CHECKING:
    import torch

# What a model's processor does: pictures, and the grids of those cut into tiles -> uint8 [views, 3, H, W]
Pixels = Callable[..., "torch.Tensor"]
Reference = str | bytes | dict[str, Any] | Image.Image
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
# What Pillow's decoders raise on damaged files, over all formats.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error)
URL_TIMEOUT = 30  # seconds


def open_image(reference: Reference, roots: Sequence[str] = (), *, draft: tuple[int, int] | None = None) -> Image.Image:
    """The picture as upright RGB.

    `draft` is the smallest width and height, in pixels, that are still of use: a larger JPEG is then decoded at 1/2,
    1/4 or 1/8 of its size, never below `draft`, several times faster. Raises SampleError (missing_image,
    unreadable_image).
    """
    if isinstance(reference, Image.Image):
        return _upright_rgb(reference)
    with _opened(reference, roots) as image:
        if draft:
            image.draft("RGB", draft[::-1] if _lies(image) else draft)
        return _upright_rgb(image)


def image_size(reference: Reference, roots: Sequence[str] = ()) -> tuple[int, int]:
    """Width and height of the picture that `open_image` gives, without decoding it. Raises like `open_image`."""
    if isinstance(reference, Image.Image):
        return reference.size[::-1] if _lies(reference) else reference.size
    with _opened(reference, roots) as image:
        return image.size[::-1] if _lies(image) else image.size


@contextmanager
def _opened(reference: Reference, roots: Sequence[str]) -> Iterator[Image.Image]:
    """The picture before it is decoded; what its decoder raises becomes a SampleError."""
    name, stream = _stream(reference, roots)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF and large pictures; what matters raises
            with Image.open(stream) as image:
                yield image
    except (*DAMAGED, Image.DecompressionBombError) as error:
        problem = "is not a picture" if isinstance(error, UnidentifiedImageError) else f"cannot be decoded ({error})"
        raise SampleError("unreadable_image", f"picture {name} {problem}") from None
    finally:
        if not isinstance(stream, Path):
            stream.close()


def is_file_reference(reference: object) -> bool:
    """True for a path: what can be looked for before training starts."""
    return isinstance(reference, str) and not reference.startswith(("http://", "https://", "data:"))


def locate(reference: str, roots: Sequence[str]) -> Path | None:
    """The first file called `reference` under `roots` (an absolute path, or no roots: the path itself)."""
    for root in roots or ("",):
        path = os.path.join(root, reference)
        if os.path.isfile(path):
            return Path(path)
    return None


def absent(reference: str, roots: Sequence[str]) -> SampleError | None:
    """Why the file `reference` cannot be a picture, from its directory entry alone: not there, or zero bytes."""
    path = locate(reference, roots)
    if path is None:
        return _missing(reference, roots)
    return SampleError("unreadable_image", _empty(path)) if path.stat().st_size == 0 else None


def problem_with(reference: Reference, roots: Sequence[str] = ()) -> tuple[str, str] | None:
    """Decode the picture in full; (kind, text) of what is wrong with it, or None."""
    try:
        open_image(reference, roots)
    except SampleError as error:
        return error.kind, error.text
    return None


def blank() -> Image.Image:
    """Stands in for a picture that cannot be read, so that shapes stay what the plan expects."""
    return Image.new("RGB", (64, 64), (127, 127, 127))


def _stream(reference: str | bytes | dict[str, Any], roots: Sequence[str]) -> tuple[str, Path | io.BytesIO]:
    """A name for messages, and what Image.open takes."""
    name = "inside the record"
    if isinstance(reference, dict):
        name = reference.get("path") or reference.get("url") or name
        reference = reference.get("bytes") or reference.get("path") or reference.get("url") or b""
    if isinstance(reference, str):
        if not is_file_reference(reference):
            return reference[:80], io.BytesIO(_download(reference))
        error = absent(reference, roots)
        if error:
            raise error
        path = locate(reference, roots)
        return str(path), path
    if not isinstance(reference, bytes):
        raise SampleError("unreadable_image", f"a picture must be a path, URL or bytes, not {type(reference).__name__}")
    if not reference:
        raise SampleError("unreadable_image", _empty(name))
    return name, io.BytesIO(reference)


def _download(url: str) -> bytes:
    try:
        if url.startswith("data:"):
            return base64.b64decode(url.partition(",")[2], validate=True)
        request = urllib.request.Request(url, headers={"User-Agent": "tinyllava"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
            return response.read()
    except (urllib.error.URLError, TimeoutError, ValueError, binascii.Error, OSError) as error:
        raise SampleError("unreadable_image", f"picture {url[:80]} cannot be loaded ({error})") from None


def _missing(reference: str, roots: Sequence[str]) -> SampleError:
    where = f" under {' or '.join(map(str, roots))}" if roots and not os.path.isabs(reference) else ""
    # The classic: OCR-VQA's pictures are .jpg in the annotations and .gif or .png on disk.
    stem = os.path.splitext(reference)[0]
    other = next((found for suffix in SUFFIXES if (found := locate(stem + suffix, roots))), None)
    hint = f" (there is {other})" if other else ""
    return SampleError("missing_image", f"picture {reference} not found{where}{hint}")


def _empty(name: object) -> str:
    return f"picture {name} has zero bytes (a download or copy that broke off? get it again)"


def _lies(image: Image.Image) -> bool:
    """Whether EXIF says that the picture lies on its side, so that width and height change places."""
    if image.format == "PNG" and "exif" not in image.info and _pixels_come_last(image.fp):
        return False
    return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def _pixels_come_last(png: IO[bytes] | None) -> bool:
    """Whether nothing but its end follows the pixels of a PNG; else Pillow decodes them, to look for EXIF there."""
    if png is None:  # decoded already
        return False
    before, seen = png.tell(), False
    png.seek(8)
    while len(head := png.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if seen and kind != b"IDAT":
            break
        seen = kind == b"IDAT"
        png.seek(length + 4, os.SEEK_CUR)  # its content and checksum
    png.seek(before)
    return seen and head[4:] == b"IEND"


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)  # decodes, and copies
    if image.mode.startswith("I"):  # 16-bit greyscale: convert("RGB") would clip everything above 255 to white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
