"""What YAML readers raise on a text that is no YAML, and the message for it."""

from typing import Any

import yaml

from tinyllava.errors import UserError

# PyYAML raises its own errors with a position. But a value that does not fit its tag raises what its conversion raises:
# KeyError for `!!bool x`, IndexError for `!!int ""`, AttributeError for `!!timestamp x`, ValueError for 2020-13-01.
YAML_FAULTS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text. Raises UserError, which names `what` was read."""
    try:
        return yaml.safe_load(text)
    except YAML_FAULTS as error:
        raise explain_yaml_fault(error, what) from None


def explain_yaml_fault(error: BaseException, what: str) -> UserError:
    """The error to raise for one of YAML_FAULTS."""
    mark = getattr(error, "problem_mark", None)
    where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = getattr(error, "problem", None) or (str(error).splitlines() or [""])[0]
    if isinstance(error, LookupError | AttributeError):
        problem = "a value does not fit its tag"  # such as !!bool
    elif isinstance(error, RecursionError):
        problem = "its values are nested too deep"
    return UserError(f"cannot read {what}{where}: {problem}. Expected YAML.")
