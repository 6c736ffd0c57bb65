"""TinyLLaVA Factory: small vision-language models from three boxes, a vision tower, a connector and a language model.

    import tinyllava
    model = tinyllava.load("runs/quickstart")
    print(model.chat("What is in the picture?", "cat.jpg"))

Importing this loads nothing heavy: torch and transformers come with the first `load`.
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllava.infer import Session

__version__ = "0.1.0"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports: it warns of a kernel not needed


def load(
    path: str,
    device: str | None = None,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    **lacking: Any,
) -> "Session":
    """A checkpoint to talk to: a checkpoint's directory, a stage's, or a whole run's. See `tinyllava.infer.Session`.

    Released checkpoints of the original TinyLLaVA Factory are read too. lacking: what such a one does not carry, such
    as template="phi" (all of it: `tinyllava.model.legacy.read`). Raises UserError when there is no whole checkpoint.
    """
    from tinyllava.infer import Session

    return Session.load(path, device=device, dtype=dtype, attn_implementation=attn_implementation, **lacking)
