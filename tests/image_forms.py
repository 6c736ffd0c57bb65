"""One image in every form in which records, messages and Python code give images."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


PNG = encode(IMAGE)
TEXT = base64.b64encode(PNG).decode()
SAFE = base64.urlsafe_b64encode(PNG).decode()
assert SAFE != TEXT and TEXT.endswith("=")  # otherwise the forms below show nothing
LINES = base64.encodebytes(PNG).decode()
URL = f"data:image/png;base64,{TEXT}"


def list_text_forms(path: Path) -> dict[str, Any]:
    """The forms that JSON can hold."""
    return {
        "path": str(path),
        "file": path.as_uri(),
        "file, upper case": path.as_uri().replace("file:", "FILE:"),
        "file, one slash": path.as_uri().replace("file://", "file:"),
        "file of localhost": path.as_uri().replace("file://", "file://localhost"),
        "file, not quoted": f"file://{path}",
        "data": URL,
        "data, upper case": URL.replace("data:image/png;base64", "DATA:IMAGE/PNG;BASE64"),
        "data, without a type": f"data:;base64,{TEXT}",
        "data, with a parameter": f"data:image/png;charset=utf-8;base64,{TEXT}",
        "data, without padding": URL.rstrip("="),
        "data, for URLs": f"data:image/png;base64,{SAFE}",
        "data, in lines": f"data:image/png;base64,\n{LINES}",
        "data, quoted": URL.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        "base64": TEXT,
        "base64, in lines": f"\n{LINES}",
        "base64, CRLF": LINES.replace("\n", "\r\n"),
        "base64, without padding": TEXT.rstrip("="),
        "base64, for URLs": SAFE,
        "datasets, path": {"bytes": None, "path": str(path)},
        "datasets, base64": {"bytes": TEXT, "path": None},
        "OpenAI": {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
        "OpenAI, path": {"type": "image_url", "image_url": {"url": str(path)}},
        "OpenAI, text": {"type": "image_url", "image_url": URL},
        "Responses": {"type": "input_image", "image_url": URL, "detail": "auto"},
        "Anthropic": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": TEXT}},
        "Anthropic, in lines": {"type": "image", "source": {"type": "base64", "data": LINES}},
        "Anthropic, URL": {"type": "image", "source": {"type": "url", "url": path.as_uri()}},
        "transformers": {"type": "image", "image": str(path)},
        "transformers, url": {"type": "image", "url": URL},
        "transformers, path": {"type": "image", "path": str(path)},
        "transformers, base64": {"type": "image", "base64": TEXT},
        "tools": {"type": "image", "data": TEXT, "mimeType": "image/png"},
        "nested": {"type": "image", "image": {"bytes": None, "path": str(path)}},
    }


class Pipe:
    """What can be read but not rewound."""

    def read(self) -> bytes:
        return PNG


def list_python_forms(path: Path) -> dict[str, Any]:
    """The forms that only Python has."""
    written = io.BytesIO()
    IMAGE.save(written, "PNG")  # its position is at the end
    return {
        "Path": path,
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "memoryview": memoryview(PNG),
        "base64 as bytes": base64.b64encode(PNG),
        "BytesIO": written,
        "open file": path.open("rb"),
        "a pipe": Pipe(),
        "PIL": IMAGE,
        "PIL, not decoded": Image.open(path),
        "numpy": PIXELS,
        "numpy, a view": PIXELS[::-1][::-1],
        "numpy, RGBA": np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)]),
        "datasets": {"bytes": PNG, "path": "elsewhere.png"},
        "transformers, PIL": {"type": "image", "image": IMAGE},
        "transformers, numpy": {"type": "image", "image": PIXELS},
        "transformers, Path": {"type": "image", "path": path},
        "nested": {"type": "image", "image": {"bytes": PNG, "path": None}},
    }


def make_record(form: Any, text: str = "what is it?") -> dict[str, Any]:
    """A record with the image as a part of its question."""
    part = form if isinstance(form, dict) and "type" in form else {"type": "image", "image": form}
    question = [part, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "a cat"}]}
