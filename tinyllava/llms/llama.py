"""Llama, TinyLlama and SmolLM2: the `llama` template unless a recipe names another."""

from typing import Any


class LLM:
    """What loading this family needs to know."""

    template = "llama"


class Copying(LLM):
    """A Llama from random weights whose heads begin by looking for tokens like their own, and copy what they find.

    Keys start equal to queries and outputs as the transpose of values: products near the identity, as those of trained
    transformers are (mimetic initialisation, arXiv 2305.09828). A small model otherwise takes thousands of steps to
    find out that the cat it is asked about is the cat it was told of.
    """

    @staticmethod
    def initialize(llm: Any) -> None:
        """Called once, on the random weights. For heads of one number: no shared keys."""
        for layer in llm.model.layers:
            attention = layer.self_attn
            attention.k_proj.weight.data.copy_(attention.q_proj.weight.data)
            attention.o_proj.weight.data.copy_(attention.v_proj.weight.data.T)
