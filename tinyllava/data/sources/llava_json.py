"""The LLaVA record, from a JSON array or JSON lines:

    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": ...}]}

`image` may be a list, or absent in a text-only record; a first turn `from: system` sets the system message.
"""

from pathlib import Path
from typing import Any

from tinyllava.config import DataSpec
from tinyllava.data.sample import Sample
from tinyllava.data.sources import Source, images_of, keys_of, roots_of, unpack
from tinyllava.data.sources._json import is_json, json_records, read_json


def matches(path: str) -> bool:
    return is_json(path) and "conversations" in keys_of(value for _, value in json_records(Path(path)))


def read(spec: DataSpec, cache_dir: Path) -> Source:
    records, content = read_json(spec, cache_dir)
    return Source(spec.path, records, to_sample, roots_of(spec, [str(Path(spec.path).parent)]), content, content)


def to_sample(record: dict[str, Any]) -> Sample:
    record = unpack(record)
    return Sample.from_llava({**record, "images": images_of(record)})
