"""The Hub's `messages` records, from a JSON array or JSON lines (hub.py reads them from tables):

    {"images": ["a.jpg"], "messages": [{"role": "user", "content": "<image>\\nWhat?"}, {"role": "assistant", ...}]}

Content is text, or parts such as {"type": "image"} and {"type": "text", "text": "What?"}. Images: paths, URLs, bytes.
"""

from pathlib import Path
from typing import Any

from tinyllava.config import DataSpec
from tinyllava.data.sample import Sample
from tinyllava.data.sources._json import has_key, open_json
from tinyllava.data.sources.source import Source, unpack


def matches(path: str) -> bool:
    """Whether `path` is a JSON file with `messages` in its first records."""
    return has_key(path, "messages")


def read(spec: DataSpec, cache_dir: Path) -> Source:
    """The records of the file, converted to Arrow once."""
    return open_json(spec, cache_dir, to_sample)


def to_sample(record: dict[str, Any]) -> Sample:
    """The Sample of a raw record."""
    return Sample.from_messages(unpack(record))
