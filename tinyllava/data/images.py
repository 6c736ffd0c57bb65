"""Images: open whatever a record holds as an upright RGB image, or raise an error that names the image.

`references.py` lists the accepted forms. EXIF rotation is applied, as in transformers' `load_image`, so that training
and serving see the same image. Transparent images are shown on white.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from io import BufferedIOBase, BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from tinyllava.data.references import Reference, describe_reference, is_file_reference, resolve_reference, shorten
from tinyllava.data.sample import SampleError
from tinyllava.downloads import read_url

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
# Some of Pillow's other decoders start programs (EPS) or take any file for an image (SPIDER).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "ICO", "TGA", "QOI", "AVIF")
# What Pillow's decoders raise on damaged files, over all formats.
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, RuntimeError)
DAMAGED += (struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning)
PIXELS = 89_478_485  # Pillow's limit, of which it only warns, and which other packages switch off. They take 0.3 GB
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Image.Transpose that turns it upright


class ImageFolders(list[str]):
    """Where the images of records are searched.

    If the user names the folders, records cannot name files outside of them; links inside may lead out.
    """

    def __init__(self, folders: Sequence[str], named: bool = True, urls: bool = False) -> None:
        super().__init__(folders)
        self.named, self.urls = named, urls  # urls: whether a record may name a URL


def open_image(reference: Reference, roots: Sequence[str] = (), *, draft: tuple[int, int] | None = None) -> Image.Image:
    """Open an image as upright RGB. A PIL image is copied.

    draft: the smallest useful width and height in pixels. A larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but
    never below `draft`, which is several times faster. Raises SampleError (missing_image, unreadable_image).
    """
    with _open_undecoded(reference, roots) as image:
        is_deep = ";16" in str(getattr(image, "tile", ""))  # before its decoding, which keeps 8 of the 16 bits
        orientation = _read_orientation(image)
        if draft and image is not reference:
            image.draft("RGB", draft[::-1] if orientation > 4 else draft)
        image.load()
        if is_deep and image.mode in ("RGB", "RGBA", "LA") and _is_almost_black(image):
            raise ValueError("its colours have 16 bits, but use only the lower 12: save them with 8")
        return _to_rgb(image.transpose(TURNS[orientation]) if orientation > 1 else image)


def read_image_size(reference: Reference, roots: Sequence[str] = ()) -> tuple[int, int]:
    """Width and height of the image that `open_image` returns, without decoding it. Raises like `open_image`."""
    with _open_undecoded(reference, roots) as image:
        return image.size[::-1] if _read_orientation(image) > 4 else image.size


@contextmanager
def _open_undecoded(reference: Reference, roots: Sequence[str]) -> Iterator[Image.Image]:
    """Open an image without decoding it. Errors of its decoder become a SampleError."""
    name, source = describe_reference(reference), resolve_reference(reference)
    content = _find_content(source, roots) if isinstance(source, str | bytes) else source
    name = shorten(str(content)) if isinstance(content, Path) else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd EXIF: real faults raise an error
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with nullcontext(content) if content is source else Image.open(content, "r", FORMATS) as image:
                if image is not source and image.width * image.height > (most := Image.MAX_IMAGE_PIXELS or PIXELS):
                    raise ValueError(f"it has {image.width}x{image.height} pixels, at most {most:,} are allowed")
                yield image
    except DAMAGED as error:
        unknown = f"is not an image of a known format ({', '.join(FORMATS)})"
        problem = unknown if isinstance(error, UnidentifiedImageError) else f"cannot be decoded ({shorten(str(error))})"
        raise SampleError("unreadable_image", f"image {name} {problem}") from None


def _find_content(source: str | bytes, roots: Sequence[str]) -> Path | BytesIO:
    """The file of a path, or the content that bytes or a URL give."""
    if isinstance(source, bytes):
        return BytesIO(source)
    if error := find_file_fault(source, roots):
        raise error
    try:
        return find_file(source, roots) if is_file_reference(source) else BytesIO(read_url(source))
    except OSError as error:
        raise SampleError("unreadable_image", f"image {shorten(source)} cannot be loaded ({error})") from None


def find_file(reference: str, roots: Sequence[str]) -> Path | None:
    """The first file called `reference` under `roots` (an absolute path, or no roots: the path itself)."""
    may_leave = getattr(roots, "named", False) and (".." in reference or os.path.isabs(reference))
    bounds = tuple(os.path.join(os.path.abspath(root), "") for root in roots) if may_leave else ()
    for root in roots or ("",):
        path = os.path.normpath(os.path.join(root, reference))  # what is checked is opened
        if os.path.isfile(path) and (not may_leave or os.path.abspath(path).startswith(bounds)):
            return Path(path)
    return None


def find_file_fault(reference: str, roots: Sequence[str]) -> SampleError | None:
    """Why a path or URL cannot be an image, without opening it: it is missing, has zero bytes, or is not allowed."""
    if not is_file_reference(reference):
        text = f"image {shorten(reference)} is a URL. `urls: true` beside its `path:` allows its download"
        return None if getattr(roots, "urls", True) else SampleError("unreadable_image", text)
    path = find_file(reference, roots)
    if path is None or path.stat().st_size > 0:
        return _explain_missing(reference, roots) if path is None else None
    text = f"image {shorten(str(path))} has zero bytes. Was a download or copy interrupted? Get it again"
    return SampleError("unreadable_image", text)


def make_blank_image() -> Image.Image:
    """A grey image that replaces one that cannot be read, so that batches keep the shapes of the plan."""
    return Image.new("RGB", (64, 64), (127, 127, 127))


def _explain_missing(reference: str, roots: Sequence[str]) -> SampleError:
    searched = roots if getattr(roots, "named", False) or not os.path.isabs(reference) else ()
    where = f" under {' or '.join(map(str, searched))}" if searched else ""
    # A known case: OCR-VQA's images are .jpg in the annotations and .gif or .png on disk.
    stem = os.path.splitext(reference)[0]
    similar = next((path for suffix in SUFFIXES if (path := find_file(stem + suffix, roots))), None)
    hint = f" (there is {similar})" if similar else ""
    return SampleError("missing_image", f"image {shorten(reference)} not found{where}{hint}")


def _read_orientation(image: Image.Image) -> int:
    """The EXIF orientation that remains to be applied: 1 (upright) to 8. Damaged EXIF counts as 1."""
    is_late = image.format == "PNG" and "exif" not in image.info and image.fp and not _has_pixels_last(image.fp)
    if is_late or image.format == "TIFF":  # a PNG's EXIF may follow its pixels; Pillow turns a TIFF while it decodes it
        image.load()
    orientation = 1
    with suppress(*DAMAGED):
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # PNG's own getexif always decodes
    return orientation if orientation in TURNS else 1


def _has_pixels_last(png: BufferedIOBase) -> bool:
    """Whether a PNG ends right after its pixels. Otherwise Pillow decodes the pixels to look for EXIF after them.

    A PNG is an 8-byte signature and chunks: length, kind, content, checksum. IDAT chunks hold the pixels.
    """
    before, kinds = png.tell(), []
    png.seek(8)
    while len(head := png.read(8)) == 8:
        kinds.append(head[4:])
        png.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)  # its content and checksum
    png.seek(before)
    return kinds[-2:] == [b"IDAT", b"IEND"]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _scale_to_grey(image)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # which becomes nothing else directly
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _is_almost_black(image: Image.Image) -> bool:
    """Whether no colour is over 15 of 255. Black ink on a transparent ground is not meant."""
    *colours, alpha = (high for _, high in image.convert("RGBA").getextrema())
    return max(colours) < 16 and (max(colours) > 0 or alpha < 16 or image.mode == "RGB")


def _scale_to_grey(image: Image.Image) -> Image.Image:
    """An image of 16-bit, 32-bit or float values with 8 bits, so that it is neither black nor white.

    Values from 0 to 65535 have as many bits as the highest needs: 12 bits in a 16-bit file are usual.
    Floats from 0 to 1 are taken as they are. All others are stretched from the lowest to the highest.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("it has NaN or infinite values")
    if image.mode != "F" and low >= 0 and high < 2**16:
        low, high = 0, max(1, 2 ** int(high).bit_length() - 1)
    elif low >= 0 and 0.5 <= high <= 1:
        low, high = 0, 1
    grey, rows = np.empty(values.shape, np.uint8), max(1, (1 << 20) // image.width)
    for top in range(0, image.height, rows):  # 89 million pixels took 2.5 GB at once
        strip = values[top : top + rows].astype(np.float64)
        scaled = (strip - low) / (high - low) if high > low else np.full_like(strip, 0.5)
        if isinstance(image.info.get("transparency"), int):
            scaled[strip == image.info["transparency"]] = 1  # white
        grey[top : top + rows] = np.rint(scaled * 255)
    return Image.fromarray(grey)
