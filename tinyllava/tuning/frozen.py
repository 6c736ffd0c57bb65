"""`frozen`: do not train the part. A frozen vision tower runs without autograd."""

from tinyllava.tuning import Selection, TunablePart, declare_options


@declare_options
class Tuning:
    """Train nothing."""

    def select(self, part: TunablePart) -> Selection:
        """Select no parameters."""
        return Selection()
