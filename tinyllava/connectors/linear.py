"""`linear`: one linear layer, the projector of the first LLaVA (arXiv 2304.08485)."""

import torch
from torch import Tensor, nn


class Connector(nn.Module):
    """[B, N, vision_dim] -> [B, N, text_dim]."""

    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_dim, text_dim)

    def num_tokens(self, patches: int) -> int:
        """One token for each patch."""
        return patches

    @staticmethod
    def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`weight` -> `linear_1.weight`."""
        return {f"linear_1.{name}": tensor for name, tensor in state.items()}

    def llava_projector(self) -> dict:
        """Llava's projector with a linear activation and an identity as its second layer."""
        return {"projector_hidden_act": "linear", "multimodal_projector_bias": True}

    def to_llava(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the identity layer that Llava's projector has."""
        weight = state["linear_1.weight"]
        return {
            **state,
            "linear_2.weight": torch.eye(weight.shape[0], dtype=weight.dtype),
            "linear_2.bias": torch.zeros(weight.shape[0], dtype=weight.dtype),
        }

    def forward(self, features: Tensor) -> Tensor:
        """Project the features."""
        return self.linear_1(features)
