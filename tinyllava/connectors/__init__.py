"""Connectors map the features of an image into the LLM's embedding space. One file is one connector.

Read linear.py first, then mlp.py.

A file defines one class. B images, N features each, T image tokens:

    class Connector(nn.Module):
        def __init__(self, vision_dim: int, text_dim: int, **options): ...
        def num_tokens(self, patches: int) -> int: ...  # T for N = patches, exact: it is called before a model runs
        def forward(self, features: Tensor) -> Tensor: ...  # [B, N, vision_dim] -> [B, T, text_dim]

Options are the arguments of `__init__` after the two widths. Two static methods are optional:

    class Connector(nn.Module):
        @staticmethod
        def from_short_name(name: str) -> dict | None: ...  # options for a name like mlp2x_gelu; None: not a short name
        @staticmethod
        def options_from_tower(options: dict, tower_config: PreTrainedConfig, feature_layers: list[int]) -> dict: ...

`options_from_tower` returns the recipe's options, and adds the values that follow from the vision tower.
`feature_layers` are the layers whose features are joined on channels. Building a model calls this method and stores the
result in the model's config.

A connector that computes exactly what transformers' Llava projector computes (linear_1, act, linear_2) also defines

    class Connector(nn.Module):
        def llava_projector(self) -> dict | None: ...  # Llava's config fields; None if these options do not fit it
        def to_llava(self, state: dict) -> dict: ...  # its weights under Llava's names; without it, the names are equal

and its checkpoints are then plain `llava`. A connector that the original TinyLLaVA Factory had also defines

    class Connector(nn.Module):
        @staticmethod
        def from_original(state: dict) -> dict: ...  # our names for the original's weights; without it, they are equal

where `state` has the names that follow `_connector.` in the original's files.

A recipe can name a connector outside the package, as `my_pkg.my_module:Connector` (docs/add-your-own-connector.md).

Initialisation: after `__init__`, every Linear, Conv and norm is initialised as in the LLM (Linear: N(0, the LLM's
`initializer_range`), bias 0). A parameter of the connector itself, such as learned queries, keeps its value from
`__init__`. The recipe's seed determines both.
"""
