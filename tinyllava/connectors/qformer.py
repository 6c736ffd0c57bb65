"""`qformer`: BLIP-2's Q-Former (arXiv 2301.12597, section 3.1), so that any picture takes `num_queries` tokens.

Learned queries in a BERT that reads the features in every second layer.

Further options are fields of transformers' `Blip2QFormerConfig`; its defaults are BERT base's, which the original
TinyLLaVA Factory takes, with random weights too:

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
        unknown = [name for name in options if name not in known]
        if unknown:
            raise UserError(f"connector qformer has no option {unknown[0]}. Known: {', '.join(known)}.")
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
        """Its BERT renamed. There the first norm has no weights (here: ones and zeros) and no embedding is in use."""
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
        """Let the queries read the features, and project what they found."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        found = self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        return self.projector(found)
