"""`qformer`: BLIP-2's Q-Former (arXiv 2301.12597, section 3.1). Every image takes `num_queries` tokens.

Learned queries run through a BERT that attends to the image features in every second layer.

All other options are fields of transformers' `Blip2QFormerConfig`. The defaults are those of BERT base, as in the
original TinyLLaVA Factory, which also starts from random weights:

    connector: {qformer: {num_queries: 64, num_hidden_layers: 6}}
"""

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from tinyllava.errors import UserError


class Connector(nn.Module):
    """[B, N, vision_dim] -> [B, num_queries, text_dim]."""

    def __init__(self, vision_dim: int, text_dim: int, num_queries: int = 128, **options: object):
        super().__init__()
        known = sorted({"num_queries", *Blip2QFormerConfig.__annotations__} - {"encoder_hidden_size"})
        if unknown := [name for name in options if name not in known]:
            raise UserError(f"connector qformer has no option '{unknown[0]}'. Known: {', '.join(known)}.")
        config = Blip2QFormerConfig(encoder_hidden_size=vision_dim, **options)
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"connector qformer: hidden_size {config.hidden_size} is not a multiple of"
                f" num_attention_heads {config.num_attention_heads}. Give both."
            )
        self.num_queries = num_queries
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, config.hidden_size) * config.initializer_range)
        self.qformer = Blip2QFormerModel(config)
        self.projector = nn.Linear(config.hidden_size, text_dim)

    @staticmethod
    def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the BERT's weights, and leave out its word embeddings, which are never used.

        The original's first norm has no weights. Ours has them: ones and zeros compute the same.
        """
        dim = state["projector.weight"].shape[1]
        renamed = {
            name.replace("bert.", "qformer.", 1).replace("attention.self.", "attention.attention."): tensor
            for name, tensor in state.items()
            if not name.startswith("bert.embeddings.")
        }
        return {**renamed, "qformer.layernorm.weight": torch.ones(dim), "qformer.layernorm.bias": torch.zeros(dim)}

    def num_tokens(self, patches: int) -> int:
        """The number of queries."""
        return self.num_queries

    def forward(self, features: Tensor) -> Tensor:
        """Let the queries attend to the features, and project their states."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        states = self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        return self.projector(states)
