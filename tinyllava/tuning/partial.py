"""`partial`: train the last layers of a tower or an LLM, and freeze the rest.

In a recipe:

    tune: {vision_tower: {partial: {last: 12}}}
"""

from pydantic import Field

from tinyllava.errors import UserError
from tinyllava.tuning import Selection, TunablePart, declare_options


@declare_options
class Tuning:
    """Train the `last` layers. Only used layers count: with feature layer -2, a tower's last layer is not used."""

    last: int = Field(default=1, gt=0)

    def select(self, part: TunablePart) -> Selection:
        """Select the parameters of the last used layers. Raises UserError if the part has fewer layers."""
        used = [block for block in part.blocks if part.is_used(block)]
        if self.last > len(used):
            raise UserError(
                f"partial tuning of the {part.title} asks for its last {self.last} layers, but it has"
                f" {len(used)} in use. Lower `last`, or use `full`."
            )
        # The dot keeps `layers.1` from matching `layers.10`.
        chosen = tuple(f"{block}." for block in used[-self.last :])
        return Selection(parameters=[name for name in part.parameters if name.startswith(chosen)])
