"""Gemma: the `gemma` template unless a recipe names another."""


class LLM:
    """What transformers cannot know about this family."""

    template = "gemma"
