"""`full`: train every parameter of the part that the loss depends on."""

from tinyllava.tuning import Selection, TunablePart, declare_options


@declare_options
class Tuning:
    """Train all used parameters.

    A tower's layers above the feature layer are not used: DDP would wait for gradients that they never get.
    """

    def select(self, part: TunablePart) -> Selection:
        """Select all used parameters."""
        return Selection(parameters=list(part.parameters))
