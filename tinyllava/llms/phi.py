"""Phi-1, Phi-1.5 and Phi-2: the `phi` template unless a recipe names another."""


class LLM:
    """What transformers cannot know about this family."""

    template = "phi"
