"""Llama, TinyLlama and SmolLM2: the `llama` template unless a recipe names another."""

from transformers import PreTrainedModel


class LLM:
    """What transformers cannot know about this family."""

    template = "llama"


class Copying(LLM):
    """A Llama with random weights whose heads first attend to similar tokens and copy them.

    The key weights start equal to the query weights, and the output weights equal to the transpose of the value
    weights. Their products are then near the identity, as in trained transformers (mimetic initialisation, arXiv
    2305.09828). Without this, a small model takes
    thousands of steps to learn to relate a word in the question to the same word in the context.
    """

    @staticmethod
    def initialize(llm: PreTrainedModel) -> None:
        """Change the random weights in place. Requires as many key heads as query heads."""
        for layer in llm.model.layers:
            attention = layer.self_attn
            attention.k_proj.weight.data.copy_(attention.q_proj.weight.data)
            attention.o_proj.weight.data.copy_(attention.v_proj.weight.data.T)
