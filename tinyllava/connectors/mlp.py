"""`mlp`: N linear layers with an activation between them; `mlp2x_gelu` is LLaVA-1.5's (arXiv 2310.03744)."""

import re

from torch import Tensor, nn
from transformers.activations import ACT2FN

from tinyllava.errors import UserError


class Connector(nn.Module):
    """[B, N, vision_dim] -> [B, N, text_dim] through linear_1, act, linear_2, ...

    (Llava's own names for two layers).
    """

    def __init__(self, vision_dim: int, text_dim: int, layers: int = 2, act: str = "gelu"):
        super().__init__()
        if layers < 1 or act not in ACT2FN:
            raise UserError(
                f"connector mlp: layers >= 1 and a known activation expected, found layers={layers}, act={act}."
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
        """`0.weight`, `2.weight`, ... (its activations are counted too) -> `linear_1.weight`, `linear_2.weight`, ..."""
        parts = [(*name.split("."), tensor) for name, tensor in state.items()]
        return {f"linear_{int(index) // 2 + 1}.{kind}": tensor for index, kind, tensor in parts}

    def num_tokens(self, patches: int) -> int:
        """One token a patch."""
        return patches

    def llava_projector(self) -> dict | None:
        """Two layers are Llava's projector."""
        return {"projector_hidden_act": self.act_name, "multimodal_projector_bias": True} if self.layers == 2 else None

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layers; no activation after the last."""
        tokens = self.linear_1(features)
        for layer in range(2, self.layers + 1):
            tokens = getattr(self, f"linear_{layer}")(self.act(tokens))
        return tokens
