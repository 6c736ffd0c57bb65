"""`partial`: the last layers of a tower or an LLM are trained, the rest is frozen.

tune: {vision_tower: {partial: {last: 12}}}
"""

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from tinyllava.errors import UserError
from tinyllava.tuning import Part, Selection


@dataclass(config=ConfigDict(extra="forbid"))
class Tuning:
    """Train the `last` layers, counted among the layers that are used (feature layer -2 leaves a tower's last one
    out).
    """

    last: int = Field(default=1, gt=0)

    def select(self, part: Part) -> Selection:
        """The parameters of the last used layers. Raises UserError when the part has fewer layers."""
        used = [block for block in part.blocks if part.used(block)]
        if self.last > len(used):
            raise UserError(
                f"partial tuning of the {part.title} asks for its last {self.last} layers, but it has"
                f" {len(used)} in use. Lower `last`, or use `full`."
            )
        chosen = tuple(f"{block}." for block in used[-self.last :])
        return Selection(parameters=[name for name in part.parameters if name.startswith(chosen)])
