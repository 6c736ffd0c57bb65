"""`pixel_shuffle_mlp`: each square of scale x scale patches becomes one token of scale**2 the width, then an MLP.

Space-to-depth loses no information and divides the number of image tokens by scale**2, as in InternVL-1.5 (arXiv
2404.16821) and SmolVLM (arXiv 2504.05299). SigLIP-so400m's 27 x 27 patches become 81 tokens at scale 3.
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
        if not isinstance(scale, int) or scale < 1:
            raise UserError(f"connector pixel_shuffle_mlp: scale must be at least 1, found {scale}.")
        self.scale = scale
        self.mlp = MLP(vision_dim * scale**2, text_dim, layers=layers, act=act)

    def num_tokens(self, patches: int) -> int:
        """One token for each square. Raises UserError when the grid of patches cannot be cut into such squares."""
        return (self.get_side(patches) // self.scale) ** 2

    def get_side(self, patches: int) -> int:
        """The side of the grid of patches. Raises UserError for a grid that `scale` does not divide."""
        side = math.isqrt(patches)
        if side**2 != patches:
            raise UserError(
                f"connector pixel_shuffle_mlp requires a square grid of patches, found {patches} features."
                " Use feature_strategy: patch, which drops the tower's class token."
            )
        if side % self.scale:
            divisors = ", ".join(str(scale) for scale in range(2, side + 1) if side % scale == 0)
            raise UserError(
                f"connector pixel_shuffle_mlp: scale {self.scale} does not divide the grid of {side} x {side} patches."
                f" Scales that do: {divisors}."
            )
        return side

    def forward(self, features: Tensor) -> Tensor:
        """Shuffle the patches, then project them."""
        side = self.get_side(features.shape[1])
        grid = features.transpose(1, 2).unflatten(2, (side, side))  # [B, Dv, side, side]
        return self.mlp(F.pixel_unshuffle(grid, self.scale).flatten(2).transpose(1, 2))
