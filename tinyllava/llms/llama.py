"""Llama, TinyLlama and SmolLM2: the `llama` template unless a recipe names another."""


class LLM:
    """What loading this family needs to know."""

    template = "llama"
