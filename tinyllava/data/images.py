"""Images: open whatever a record holds as an upright RGB image, or raise an error that names the image.

A reference is a path (searched in several folders), an http(s) or data: URL, bytes, the Hub's {"bytes", "path"}, or a
PIL image. EXIF rotation is applied, as in transformers' `load_image`, so that training and serving see the same image.
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

# What a model's processor does: images, and the grids of those cut into tiles -> uint8 [views, 3, H, W]
Pixels = Callable[..., "torch.Tensor"]
Reference = str | bytes | dict[str, Any] | Image.Image
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
# What Pillow's decoders raise on damaged files, over all formats.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error)
URL_TIMEOUT = 30  # seconds


def open_image(reference: Reference, roots: Sequence[str] = (), *, draft: tuple[int, int] | None = None) -> Image.Image:
    """Open an image as upright RGB.

    draft: the smallest useful width and height in pixels. A larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but
    never below `draft`, which is several times faster. Raises SampleError (missing_image, unreadable_image).
    """
    if isinstance(reference, Image.Image):
        return _to_upright_rgb(reference)
    with _open_undecoded(reference, roots) as image:
        if draft:
            image.draft("RGB", draft[::-1] if _is_sideways(image) else draft)
        return _to_upright_rgb(image)


def read_image_size(reference: Reference, roots: Sequence[str] = ()) -> tuple[int, int]:
    """Width and height of the image that `open_image` returns, without decoding it. Raises like `open_image`."""
    if isinstance(reference, Image.Image):
        return reference.size[::-1] if _is_sideways(reference) else reference.size
    with _open_undecoded(reference, roots) as image:
        return image.size[::-1] if _is_sideways(image) else image.size


@contextmanager
def _open_undecoded(reference: Reference, roots: Sequence[str]) -> Iterator[Image.Image]:
    """Open an image without decoding it. Errors of its decoder become a SampleError."""
    name, stream = _open_stream(reference, roots)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd EXIF and large images: real faults raise an error
            with Image.open(stream) as image:
                yield image
    except (*DAMAGED, Image.DecompressionBombError) as error:
        problem = "is not an image" if isinstance(error, UnidentifiedImageError) else f"cannot be decoded ({error})"
        raise SampleError("unreadable_image", f"image {name} {problem}") from None
    finally:
        if not isinstance(stream, Path):
            stream.close()


def is_file_reference(reference: object) -> bool:
    """Whether the reference is the path of a file. Files can be checked before training starts."""
    return isinstance(reference, str) and not reference.startswith(("http://", "https://", "data:"))


def find_file(reference: str, roots: Sequence[str]) -> Path | None:
    """The first file called `reference` under `roots` (an absolute path, or no roots: the path itself)."""
    for root in roots or ("",):
        path = os.path.join(root, reference)
        if os.path.isfile(path):
            return Path(path)
    return None


def find_file_fault(reference: str, roots: Sequence[str]) -> SampleError | None:
    """Why the file `reference` cannot be an image, from its directory entry alone: it is missing or has zero bytes."""
    path = find_file(reference, roots)
    if path is None:
        return _explain_missing(reference, roots)
    return SampleError("unreadable_image", _explain_empty(path)) if path.stat().st_size == 0 else None


def make_blank_image() -> Image.Image:
    """A grey image that replaces one that cannot be read, so that batches keep the shapes of the plan."""
    return Image.new("RGB", (64, 64), (127, 127, 127))


def _open_stream(reference: str | bytes | dict[str, Any], roots: Sequence[str]) -> tuple[str, Path | io.BytesIO]:
    """The name of an image for messages, and the path or stream for Image.open."""
    name = "inside the record"
    if isinstance(reference, dict):
        name = reference.get("path") or reference.get("url") or name
        reference = reference.get("bytes") or reference.get("path") or reference.get("url") or b""
    if isinstance(reference, str):
        if not is_file_reference(reference):
            return reference[:80], io.BytesIO(_download(reference))
        error = find_file_fault(reference, roots)
        if error:
            raise error
        path = find_file(reference, roots)
        return str(path), path
    if not isinstance(reference, bytes):
        raise SampleError("unreadable_image", f"an image must be a path, URL or bytes, not {type(reference).__name__}")
    if not reference:
        raise SampleError("unreadable_image", _explain_empty(name))
    return name, io.BytesIO(reference)


def _download(url: str) -> bytes:
    try:
        if url.startswith("data:"):
            return base64.b64decode(url.partition(",")[2], validate=True)
        request = urllib.request.Request(url, headers={"User-Agent": "tinyllava"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
            return response.read()
    except (urllib.error.URLError, TimeoutError, ValueError, binascii.Error, OSError) as error:
        raise SampleError("unreadable_image", f"image {url[:80]} cannot be loaded ({error})") from None


def _explain_missing(reference: str, roots: Sequence[str]) -> SampleError:
    where = f" under {' or '.join(map(str, roots))}" if roots and not os.path.isabs(reference) else ""
    # A known case: OCR-VQA's images are .jpg in the annotations and .gif or .png on disk.
    stem = os.path.splitext(reference)[0]
    similar = next((path for suffix in SUFFIXES if (path := find_file(stem + suffix, roots))), None)
    hint = f" (there is {similar})" if similar else ""
    return SampleError("missing_image", f"image {reference} not found{where}{hint}")


def _explain_empty(name: object) -> str:
    return f"image {name} has zero bytes. Was a download or copy interrupted? Get it again"


def _is_sideways(image: Image.Image) -> bool:
    """Whether EXIF says that the image lies on its side, so that width and height must be swapped."""
    if image.format == "PNG" and "exif" not in image.info and _has_pixels_last(image.fp):
        return False
    return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def _has_pixels_last(png: IO[bytes] | None) -> bool:
    """Whether a PNG ends right after its pixels. Otherwise Pillow decodes the pixels to look for EXIF after them.

    A PNG is an 8-byte signature and chunks: length, kind, content, checksum. IDAT chunks hold the pixels.
    """
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


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)  # decodes and copies
    if image.mode.startswith("I"):  # 16-bit greyscale: convert("RGB") would clip everything above 255 to white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode == "P" and "transparency" in image.info:  # Pillow warns when these become RGB directly
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
