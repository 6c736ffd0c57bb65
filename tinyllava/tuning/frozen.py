"""`frozen`: nothing of the part is trained. A frozen tower runs without autograd."""

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from tinyllava.tuning import Part, Selection


@dataclass(config=ConfigDict(extra="forbid"))
class Tuning:
    """Train nothing."""

    def select(self, part: Part) -> Selection:
        """No parameters."""
        return Selection()
