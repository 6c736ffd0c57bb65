"""Convert KEY=VALUE options of the command line to keywords of `tinyllava.load`."""

from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.yaml_faults import parse_yaml


def parse_keywords(pairs: list[str] | None) -> dict[str, Any]:
    """Parse `--lacking KEY=VALUE` options. A value is YAML, or the path of a JSON or YAML file.

    Raises UserError for an option without a value and for a file that does not exist.
    """
    keywords = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"cannot read --lacking '{pair}': expected KEY=VALUE, like template=phi.")
        is_file = text.endswith((".json", ".yaml", ".yml"))
        if is_file and not Path(text).is_file():
            raise UserError(f"--lacking {key}: file {text} not found. Give an existing file.")
        content = Path(text).read_text(encoding="utf-8", errors="surrogateescape") if is_file else text
        keywords[key] = parse_yaml(content, f"--lacking {key}")
    return keywords
