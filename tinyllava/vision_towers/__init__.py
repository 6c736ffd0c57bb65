"""Vision towers turn pictures into patch features: one file each, named by `config.model_type` (without
`_vision_model`).

    class VisionTower:                      # knowledge about a family of transformers vision models, no state
        prefix_tokens(config) -> int        # CLS and register tokens that stand before the patches
        image_processor(config) -> dict     # fields of LlavaImageProcessor that equal the family's own processor

A tower loads through `AutoModel`; its file only says what transformers cannot tell.
"""
