"""`mof_mlp`: two towers' features through an MLP each, their tokens interleaved (MoF, arXiv 2401.06209, section 4.2).

The features are those of a mixture of towers: joined on channels, the first tower's before the second's. `first_dim` is
the width of the first tower's. By default it is taken from the mixture, or half of all channels.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tinyllava.connectors.mlp import Connector as MLP
from tinyllava.errors import UserError


class Connector(nn.Module):
    """[B, N, D1 + D2] -> [B, 2 N, text_dim]: first, second, first, second, ..."""

    def __init__(self, vision_dim: int, text_dim: int, first_dim: int | None = None):
        super().__init__()
        if first_dim is None and vision_dim % 2:
            raise UserError(
                f"connector mof_mlp: {vision_dim} channels cannot be split into two equal halves."
                " Give first_dim, the width of the first tower."
            )
        first_dim = vision_dim // 2 if first_dim is None else first_dim
        if not 0 < first_dim < vision_dim:
            raise UserError(
                f"connector mof_mlp: first_dim {first_dim} leaves no second tower in {vision_dim} channels."
                " Use it with a mixture of two towers."
            )
        self.widths = [first_dim, vision_dim - first_dim]
        self.first, self.second = (MLP(width, text_dim) for width in self.widths)

    @staticmethod
    def options_from_tower(options: dict, tower_config: PreTrainedConfig, feature_layers: list[int]) -> dict:
        """Add the `first_dim` of a mixture: the features alone do not show where a tower's channels end."""
        first = getattr(tower_config, "first", None)
        return options if first is None else {"first_dim": first.hidden_size * len(feature_layers), **options}

    @staticmethod
    def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`clip.0.weight`, `dinov2.0.weight` -> `first.linear_1.weight`, `second.linear_1.weight`."""
        weights = {}
        for ours, theirs in (("first", "clip."), ("second", "dinov2.")):
            mlp = {name.removeprefix(theirs): tensor for name, tensor in state.items() if name.startswith(theirs)}
            weights |= {f"{ours}.{name}": tensor for name, tensor in MLP.from_original(mlp).items()}
        return weights

    def num_tokens(self, patches: int) -> int:
        """Two tokens for each patch, one of each tower."""
        return 2 * patches

    def forward(self, features: Tensor) -> Tensor:
        """Project each tower's features and interleave the tokens."""
        first, second = features.split(self.widths, dim=-1)
        return torch.stack([self.first(first), self.second(second)], dim=2).flatten(1, 2)
