"""`qwen2`: the default template of this family."""


class LLM:
    """What loading this family needs to know."""

    template = "qwen2_base"
