"""`embeddings`: only the rows of new tokens are trained, in the LLM's embeddings and in its output head.

tune: {llm: {embeddings: {}, lr: 1.0e-3}}           # with LoRA on the same LLM: {lora: {new_tokens: true}}

New are the rows that building the model added for tokens the LLM did not know, and the row of `<image>` where that
went into a spare one; the model's config lists them. All other rows keep every bit: their gradient is zero, and there
is no weight decay.
"""

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from tinyllava.tuning import Part, Selection


@dataclass(config=ConfigDict(extra="forbid"))
class Tuning:
    """Train the rows of new tokens."""

    def select(self, part: Part) -> Selection:
        """Those rows. Raises UserError for a part without any."""
        return Selection(rows=part.require_new_rows())
