"""`frozen`: do not train the part. A frozen vision tower runs without autograd."""

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from tinyllava.tuning import Selection, TunablePart


@dataclass(config=ConfigDict(extra="forbid"))
class Tuning:
    """Train nothing."""

    def select(self, part: TunablePart) -> Selection:
        """Select no parameters."""
        return Selection()
