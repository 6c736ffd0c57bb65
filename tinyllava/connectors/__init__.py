"""Connectors carry image features into the LLM's embedding space: one file each, `class Connector(nn.Module)`.

    __init__(self, vision_dim: int, text_dim: int, **options)
    num_tokens(self, patches: int) -> int          # image tokens that `patches` features become
    forward(self, features) -> tokens              # [B, N, vision_dim] -> [B, T, text_dim], T = num_tokens(N)

A connector that computes exactly what transformers' Llava projector computes (linear_1, act, linear_2) also defines

    llava_projector(self) -> dict | None           # the Llava config fields that describe it, None if these options do
    not to_llava(state: dict) -> dict                  # optional: its weights under Llava's names (default: they are
    already)

and its checkpoints are then plain `llava`. `from_short_name(name) -> options | None` understands names like
`mlp2x_gelu`.

A connector that the original TinyLLaVA Factory had, under other names, also defines

    @staticmethod
    from_original(state: dict) -> dict             # the original's weights, named as they follow `_connector.` in its
                                                   # files, under our names (default: they are the same)

A recipe may name one that stands outside the package, as `my_pkg.my_module:Connector` (docs/add-your-own-connector.md).

Initialisation: after `__init__`, every Linear, Conv and norm is set as the LLM's own are (Linear: N(0, its
`initializer_range`), bias 0). A parameter of the connector itself, such as learned queries, stays as `__init__` drew
it; the recipe's seed covers both.
"""
