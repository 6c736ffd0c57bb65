"""The Hub's `messages` record, from a JSON array or JSON lines (tables go through hub.py and end here too):

    {"images": ["a.jpg"], "messages": [{"role": "user", "content": "<image>\\nWhat?"}, {"role": "assistant", ...}]}

Content is text, or parts such as {"type": "image"} and {"type": "text", "text": "What?"}. Pictures: paths, URLs, bytes.
"""

from pathlib import Path
from typing import Any

from tinyllava.config import DataSpec
from tinyllava.data.sample import Sample
from tinyllava.data.sources import Source, images_of, keys_of, roots_of, unpack
from tinyllava.data.sources._json import is_json, json_records, read_json


def matches(path: str) -> bool:
    return is_json(path) and "messages" in keys_of(value for _, value in json_records(Path(path)))


def read(spec: DataSpec, cache_dir: Path) -> Source:
    records, content = read_json(spec, cache_dir)
    return Source(spec.path, records, to_sample, roots_of(spec, [str(Path(spec.path).parent)]), content, content)


def to_sample(record: dict[str, Any]) -> Sample:
    record = unpack(record)
    return Sample.from_messages({**record, "images": images_of(record)})
