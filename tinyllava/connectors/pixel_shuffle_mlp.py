"""`pixel_shuffle_mlp`: each square of scale x scale patches becomes one token, wider by as much, then an MLP.

Space-to-depth loses nothing and cuts the image tokens by scale**2, as InternVL-1.5 (arXiv 2404.16821) and SmolVLM
(arXiv 2504.05299) do: SigLIP-so400m's 27 x 27 patches are 81 tokens at scale 3.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from tinyllava.connectors.mlp import Connector as MLP
from tinyllava.errors import UserError


class Connector(nn.Module):
    """[B, N, vision_dim] -> [B, N / scale**2, text_dim]; N must be a square whose side `scale` divides."""

    def __init__(self, vision_dim: int, text_dim: int, scale: int = 2, layers: int = 2, act: str = "gelu"):
        super().__init__()
        if scale < 1:
            raise UserError(f"connector pixel_shuffle_mlp: scale must be at least 1, found {scale}.")
        self.scale = scale
        self.mlp = MLP(vision_dim * scale**2, text_dim, layers=layers, act=act)

    def num_tokens(self, patches: int) -> int:
        """One token a square. Raises UserError when the patches do not come in such squares."""
        return (self.side(patches) // self.scale) ** 2

    def side(self, patches: int) -> int:
        """The side of the grid of patches."""
        side = math.isqrt(patches)
        if side**2 != patches:
            raise UserError(
                f"connector pixel_shuffle_mlp needs a square grid of patches, found {patches} features."
                " Use feature_strategy: patch, which drops the tower's class token."
            )
        if side % self.scale:
            fitting = ", ".join(str(scale) for scale in range(2, side + 1) if side % scale == 0)
            raise UserError(
                f"connector pixel_shuffle_mlp: scale {self.scale} does not divide the grid of {side} x {side} patches."
                f" Scales that do: {fitting}."
            )
        return side

    def forward(self, features: Tensor) -> Tensor:
        """Shuffle, then project."""
        side = self.side(features.shape[1])
        grid = features.transpose(1, 2).unflatten(2, (side, side))  # [B, Dv, side, side]
        return self.mlp(F.pixel_unshuffle(grid, self.scale).flatten(2).transpose(1, 2))
