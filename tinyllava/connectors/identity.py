"""`identity`: the tower's features are the LLM's image tokens. Tower and LLM must have the same width."""

import torch
from torch import Tensor, nn

from tinyllava.errors import UserError


class Connector(nn.Module):
    """[B, N, D] -> [B, N, D]."""

    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__()
        if vision_dim != text_dim:
            raise UserError(
                f"connector identity: the tower is {vision_dim} wide and the LLM {text_dim}; they must be equal."
                " Use linear or mlp2x_gelu."
            )
        self.dim = text_dim

    def num_tokens(self, patches: int) -> int:
        """One token for each patch."""
        return patches

    def llava_projector(self) -> dict:
        """Llava's projector with a linear activation and two identity layers."""
        return {"projector_hidden_act": "linear", "multimodal_projector_bias": True}

    def to_llava(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the two identity layers."""
        weights = {f"linear_{number}.weight": torch.eye(self.dim) for number in (1, 2)}
        return {**weights, **{f"linear_{number}.bias": torch.zeros(self.dim) for number in (1, 2)}}

    def forward(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features
