"""`llama`: the default template of this family."""


class LLM:
    """What loading this family needs to know."""

    template = "llama"
