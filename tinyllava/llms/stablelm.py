"""StableLM-2: the `phi` template unless a recipe names another.

The original TinyLLaVA Factory used it too: both families end a text with the same token.
"""


class LLM:
    """What transformers cannot know about this family."""

    template = "phi"
