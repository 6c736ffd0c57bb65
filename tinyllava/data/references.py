"""References: the forms in which records, messages, the command line and Python code give an image.

`resolve_reference` turns each of them into one of three: a path or http(s) URL (str), a file's content (bytes), or a
PIL image. Every error about an image names it by `describe_reference` or `shorten`, which never print its content.
"""

import base64
import os
import re
from typing import IO, Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image

from tinyllava.data.sample import SampleError, unwrap_image
from tinyllava.secrets import hide_secrets

Reference = str | os.PathLike[str] | bytes | IO[bytes] | np.ndarray | Image.Image | dict[str, Any]
URL = re.compile(r"https?://", re.IGNORECASE)
FILE_URL = re.compile(r"file:(//(localhost(?=/))?)?", re.IGNORECASE)  # a relative path may follow, as in Qwen's data
# A data: URL, or the base64 of a file that begins like PNG, JPEG, GIF, WebP, TIFF, BMP, AVIF or JPEG 2000.
START = r"iVBORw0KGgo|[/_]9j[/_]|R0lGOD|UklGR|SUk[qr]A|TU0AK|Qk[0-3].{5}AAAA|AAAA.GZ0eX|AAAADGpQIC"
ENCODED = re.compile(rf"\s*((?i:data:)|({START})[\w+/\s-]{{24}})")


def resolve_reference(reference: Reference) -> str | bytes | Image.Image:
    """The path or URL, the bytes, or the PIL image of a reference. Raises SampleError (unreadable_image)."""
    name, reference = describe_reference(reference), unwrap_image(reference)
    try:
        if hasattr(reference, "read"):
            if getattr(reference, "seekable", bool)():
                reference.seek(0)  # it may have been written or read just now
            reference = reference.read()
        if isinstance(reference, bytes | bytearray | memoryview):
            reference = bytes(reference)
            reference = reference.decode() if ENCODED.match(reference[:64].decode("latin-1")) else reference
        if isinstance(reference, str | os.PathLike):
            return _resolve_text(os.fspath(reference))
        return reference if isinstance(reference, bytes | Image.Image) else _to_image(reference)
    except (OSError, ValueError) as error:  # base64's error is a ValueError
        raise SampleError("unreadable_image", f"image {name} cannot be read ({shorten(str(error))})") from None


def is_file_reference(reference: object) -> bool:
    """Whether the reference is the path of a file. Files can be checked before training starts."""
    return isinstance(reference, str) and not (URL.match(reference) or ENCODED.match(reference))


def describe_reference(reference: object) -> str:
    """A short name of an image for messages."""
    reference = reference if (image := unwrap_image(reference)) is None else image
    if isinstance(reference, str | os.PathLike):
        return shorten(str(reference))
    is_content = isinstance(reference, bytes | bytearray | memoryview)
    return f"of {len(reference):,} bytes" if is_content else shorten(f"of type {type(reference).__name__}")


def shorten(text: str) -> str:
    """The text on one line, and only its beginning if it is long: it may hold the content of an image."""
    limit, text = 30 if ENCODED.match(text) else 160, hide_secrets(text) if "://" in text[:160] else text
    shown = "".join(character if character.isprintable() else "?" for character in text[:limit])
    return shown if len(text) <= limit else f"{shown[:60]}... ({len(text):,} characters)"


def _resolve_text(text: str) -> str | bytes:
    if ENCODED.match(text):  # padding may be missing, lines may break, and the alphabet may be that of URLs
        content = text.partition(",")[2] if "," in text[:256] else text
        data = b"".join(unquote_to_bytes(content).split()).replace(b"-", b"+").replace(b"_", b"/").rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    return unquote(FILE_URL.sub("", text, count=1)) if FILE_URL.match(text) else text


def _to_image(array: np.ndarray) -> Image.Image:
    """The image of an array [H, W], or [H, W, C] with one, three or four channels."""
    if not isinstance(array, np.ndarray):
        raise ValueError("expected a path, a URL, base64, bytes, an open file, a PIL image or a numpy array")
    if array.dtype != np.uint8 or not array.size or array.ndim < 2 or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(f"expected uint8 [H, W] or [H, W, 1, 3 or 4], found {array.dtype} {[*array.shape]}")
    return Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array)
