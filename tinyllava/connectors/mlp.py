"""`mlp`: N linear layers with an activation between them; `mlp2x_gelu` is LLaVA-1.5's (arXiv 2310.03744)."""

import re

from torch import Tensor, nn
from transformers.activations import ACT2FN

from tinyllava.errors import UserError


class Connector(nn.Module):
    """[B, N, vision_dim] -> [B, N, text_dim] through linear_1, act, linear_2, ... (for two layers, Llava's names)."""

    def __init__(self, vision_dim: int, text_dim: int, layers: int = 2, act: str = "gelu"):
        super().__init__()
        if not isinstance(layers, int) or layers < 1 or act not in ACT2FN:
            raise UserError(
                f"connector mlp: expected layers >= 1 and a known activation, found layers={layers}, act={act}."
            )
        self.layers, self.act_name = layers, act
        self.act = ACT2FN[act]
        for layer in range(1, layers + 1):
            setattr(self, f"linear_{layer}", nn.Linear(vision_dim if layer == 1 else text_dim, text_dim))

    @staticmethod
    def from_short_name(name: str) -> dict | None:
        """`mlp2x_gelu` -> {layers: 2, act: gelu}."""
        match = re.fullmatch(r"mlp(\d+)x_(gelu|relu|silu)", name)
        return {"layers": int(match[1]), "act": match[2]} if match else None

    @staticmethod
    def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`0.weight`, `2.weight`, ... -> `linear_1.weight`, `linear_2.weight`, ..."""
        weights = {}
        for name, tensor in state.items():
            index, kind = name.split(".")
            # The original numbers activations too: layer k of its Sequential has the index 2 (k - 1).
            weights[f"linear_{int(index) // 2 + 1}.{kind}"] = tensor
        return weights

    def num_tokens(self, patches: int) -> int:
        """One token for each patch."""
        return patches

    def llava_projector(self) -> dict | None:
        """Llava's projector has exactly two layers."""
        return {"projector_hidden_act": self.act_name, "multimodal_projector_bias": True} if self.layers == 2 else None

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layers; no activation after the last."""
        tokens = self.linear_1(features)
        for layer in range(2, self.layers + 1):
            tokens = getattr(self, f"linear_{layer}")(self.act(tokens))
        return tokens
