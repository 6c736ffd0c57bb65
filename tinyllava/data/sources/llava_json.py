"""LLaVA's records, from a JSON array or JSON lines:

    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": ...}]}

`image` may be a list, or absent in a text-only record; a first turn `from: system` sets the system message.
"""

from pathlib import Path
from typing import Any

from tinyllava.config import DataSpec
from tinyllava.data.sample import Sample
from tinyllava.data.sources._json import has_key, open_json
from tinyllava.data.sources.source import Source, unpack


def matches(path: str) -> bool:
    """Whether `path` is a JSON file with `conversations` in its first records."""
    return has_key(path, "conversations")


def read(spec: DataSpec, cache_dir: Path) -> Source:
    """The records of the file, converted to Arrow once."""
    return open_json(spec, cache_dir, to_sample)


def to_sample(record: dict[str, Any]) -> Sample:
    """The Sample of a raw record."""
    return Sample.from_llava(unpack(record))
