"""A loaded checkpoint that answers: chat, evaluation and serving all go through a `Session`.

`session.py` talks and batches, `engine.py` runs the LLM, `prefix.py` says what of a batch is computed once,
`pictures.py` encodes every picture once, `likelihood.py` scores given answers, `find.py` looks for checkpoints.
"""

from tinyllava.infer.find import find_checkpoint
from tinyllava.infer.likelihood import Likelihood
from tinyllava.infer.session import Session

__all__ = ["Likelihood", "Session", "find_checkpoint"]
