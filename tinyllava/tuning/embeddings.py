"""`embeddings`: train only the rows of new tokens, in the LLM's embeddings and in its output head.

    tune: {llm: {embeddings: {}, lr: 1.0e-3}}           # with LoRA on the same LLM: {lora: {new_tokens: true}}

New rows are those that building the model added for tokens that the LLM did not know, and the row of `<image>` if that
token took a spare one. The model's config lists them. All other rows keep every bit: their gradient is zero, and they
have no weight decay.
"""

from tinyllava.tuning import Selection, TunablePart, declare_options


@declare_options
class Tuning:
    """Train the rows of new tokens."""

    def select(self, part: TunablePart) -> Selection:
        """Select the rows. Raises UserError for a part without new tokens."""
        return Selection(rows=part.require_new_rows())
