"""`full`: every parameter of the part that the loss depends on is trained."""

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from tinyllava.tuning import Part, Selection


@dataclass(config=ConfigDict(extra="forbid"))
class Tuning:
    """Train everything that is used. A tower's layers above the feature layer are not: they would only confuse DDP."""

    def select(self, part: Part) -> Selection:
        """All used parameters."""
        return Selection(parameters=list(part.parameters))
