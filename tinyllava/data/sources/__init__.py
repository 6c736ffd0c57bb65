"""Sources: open a path as raw records, and convert a raw record to a Sample. One file is one format.

A format is a module with three functions:

    matches(path: str) -> bool                       # whether the content of this path has my format
    read(spec: DataSpec, cache_dir: Path) -> Source  # open it; raises UserError
    to_sample(record: dict) -> Sample                # one raw record; raises SampleError

To add a data format of your own, write such a module and name it in a recipe as `format: my_package.my_module`. It
needs only `read`: `matches` is not called when a recipe names the format, and the Source holds `to_sample`.
`messages.py` is a short example. `unpack` returns a record as its author wrote it. To add a format to this package, put
its file here and its module into FORMATS. The formats of the package, in the order in which `open_source` tries them:

    stamps       the embedded dataset, by its name: stamps:tiny/captions
    tar          WebDataset, by `.tar` in the path or in the folder; only with `streaming: true`
    hub          tables: Parquet, any other folder, any pattern with `*`, the id of a dataset on the Hub
    llava_json   JSON or JSON lines whose first records have `conversations`
    messages     JSON or JSON lines whose first records have `messages`

`hub` accepts every folder and every pattern, so what reads folders stands before it. Records are memory-mapped Arrow or
a stream; workers do not copy them. Read source.py first, then llava_json.py.
"""

import importlib
from pathlib import Path
from types import ModuleType

from tinyllava.cache import find_cache_root
from tinyllava.config import DataSpec
from tinyllava.data.images import ImageFolders
from tinyllava.data.sources import hub, llava_json, messages, stamps, tar
from tinyllava.data.sources._json import check_exists
from tinyllava.data.sources.source import Source as Source
from tinyllava.data.sources.source import map_tables as map_tables
from tinyllava.data.sources.source import unpack as unpack
from tinyllava.errors import UserError
from tinyllava.factory import suggest_known
from tinyllava.json_records import parse_records

# In the order in which they are tried. The last two open the file and look at its first records.
FORMATS = {"stamps": stamps, "tar": tar, "hub": hub, "llava_json": llava_json, "messages": messages}


def open_source(spec: DataSpec, cache_dir: str | Path | None = None) -> Source:
    """Open the source that `spec` names. Raises UserError if it is missing, empty, broken or of an unknown format."""
    try:
        source = _find_format(spec).read(spec, find_cache_root(cache_dir))
        missing = next((root for root in source.roots if not Path(root).is_dir()), None)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot read {error.filename or spec.path}: {reason}.") from None
    source.roots = ImageFolders(source.roots, named=spec.images is not None, urls=spec.urls)
    if missing is not None:
        raise UserError(
            f"image folder {missing} of {spec.path} does not exist. Set `images:` to the folder of its images."
        )
    if not source.streaming and len(source) == 0:
        raise UserError(f"{spec.path} contains no records.")
    return source


def _find_format(spec: DataSpec) -> ModuleType:
    """The module of the format that `spec` names, or else the first format whose `matches` accepts the path."""
    if not spec.format:
        matching = (module for module in FORMATS.values() if module.matches(spec.path))
        return next(matching, None) or _refuse_path(Path(spec.path))
    if "." in spec.format:
        try:
            return importlib.import_module(spec.format)
        except (ModuleNotFoundError, TypeError, ValueError) as error:  # `..a` is relative, `.` is empty
            raise UserError(f"format {spec.format} of {spec.path} cannot be imported: {error}.") from None
    if spec.format not in FORMATS:
        raise UserError(f"unknown data format '{spec.format}'{suggest_known(spec.format, FORMATS)}")
    return FORMATS[spec.format]


def _refuse_path(path: Path) -> ModuleType:
    """Raise UserError that says why no format matches."""
    check_exists(path)
    if next(parse_records(path), None) is None:
        raise UserError(f"{path} contains no records.")
    raise UserError(
        f"{path}: the first records have neither 'conversations' (LLaVA) nor 'messages'. Expected "
        '[{"id": ..., "image": ..., "conversations": [{"from": "human", "value": ...}, ...]}, ...]; or set `format:`.'
    )
