"""TinyLLaVA Factory: small vision-language models from three parts, a vision tower, a connector and an LLM.

    import tinyllava
    model = tinyllava.load("runs/quickstart")
    print(model.chat("What is in the picture?", "cat.jpg"))

Importing the package is fast: torch and transformers are imported by the first `load`.
"""

import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllava.infer import Session

__version__ = "0.1.0"
# OpenMP reads this when torch is imported. By default, threads that wait for each other spin. On a machine with other
# work on its cores, they take the time from the thread that they wait for. Here they sleep after a short spin, because
# sleeping at once costs a quarter of the time on idle cores (perf/README.md, Waiting threads).
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
# peft imports bitsandbytes, which warns about a kernel that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load(
    path: str,
    device: str | None = None,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    **missing: Any,
) -> "Session":
    """Load a model to chat with. See `tinyllava.infer.Session`.

    path: a checkpoint, a stage, a run, a model on the Hub as USER/NAME, or `nano`, the model of the package. It can
    also be a released checkpoint of the original TinyLLaVA Factory. missing: values that such a checkpoint does not
    contain, for example template="phi" (see `tinyllava.checkpoint.legacy`). Raises UserError if there is no complete
    checkpoint, or if its files have changed since they were saved.
    """
    from tinyllava.infer import Session

    return Session.load(path, device=device, dtype=dtype, attn_implementation=attn_implementation, **missing)
