"""Inference: a `Session` answers with a loaded checkpoint, for chat, evaluation and serving. Read session.py first.

`session.py` keeps conversations and answers batches. `engine.py` runs the LLM. `prefix.py` computes shared prefixes of
prompts once. `image_encoder.py` encodes every image once. `answer.py` decodes answers from token ids. `likelihood.py`
scores given answers. `prompts.py` groups prompts into batches. `find.py` finds checkpoints and devices.
"""

from tinyllava.find import find_checkpoint
from tinyllava.infer.likelihood import Likelihood
from tinyllava.infer.session import Session

__all__ = ["Likelihood", "Session", "find_checkpoint"]
