"""`resampler`: learned latents attend to the features by cross attention. Every image takes `num_queries` tokens.

Flamingo's Perceiver resampler (arXiv 2204.14198, section 3.1.1) at the width of the LLM, as in the original TinyLLaVA
Factory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_DIM = 8, 64  # as in the original, whose weights have this shape


class LatentAttention(nn.Module):
    """Latents attend to the features and to themselves: [B, N, D], [B, T, D] -> [B, T, D]."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, HEADS * HEAD_DIM, bias=False)
        self.to_kv = nn.Linear(dim, 2 * HEADS * HEAD_DIM, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_DIM, dim, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Normalise features and latents separately, and attend."""
        media, latents = self.norm_media(media), self.norm_latents(latents)
        keys, values = self.to_kv(torch.cat([media, latents], dim=1)).chunk(2, dim=-1)
        heads = [x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for x in (self.to_q(latents), keys, values)]
        return self.to_out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def make_feed_forward(dim: int) -> nn.Sequential:
    """Norm, a layer to four times the width, GELU, a layer back; no biases."""
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
    )


class Connector(nn.Module):
    """[B, N, vision_dim] -> [B, num_queries, text_dim]. The weights have the names of the original."""

    def __init__(self, vision_dim: int, text_dim: int, num_queries: int = 128, layers: int = 3):
        super().__init__()
        self.num_queries = num_queries
        self.latents = nn.Parameter(torch.randn(num_queries, text_dim))
        self.linear = nn.Linear(vision_dim, text_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([LatentAttention(text_dim), make_feed_forward(text_dim)]) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(text_dim)

    def num_tokens(self, patches: int) -> int:
        """The number of latents."""
        return self.num_queries

    def forward(self, features: Tensor) -> Tensor:
        """Let the latents attend to the features, layer by layer."""
        media = self.linear(features)
        latents = self.latents.expand(len(features), -1, -1)
        for attention, feed in self.layers:
            latents = latents + attention(media, latents)
            latents = latents + feed(latents)
        return self.norm(latents)
