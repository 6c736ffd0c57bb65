"""Qwen1.5, Qwen2 and Qwen2.5: the `qwen2_base` template unless a recipe names another (Instruct: `qwen2_instruct`)."""


class LLM:
    """What transformers cannot know about this family."""

    template = "qwen2_base"
