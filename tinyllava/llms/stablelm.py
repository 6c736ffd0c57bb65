"""StableLM-2: the `phi` template unless a recipe names another (as in the original: its end-of-text token is Phi's)."""


class LLM:
    """What loading this family needs to know."""

    template = "phi"
