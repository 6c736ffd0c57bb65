"""Gemma: the `gemma` template unless a recipe names another."""


class LLM:
    """What loading this family needs to know."""

    template = "gemma"
