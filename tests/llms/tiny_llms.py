"""Tiny configs of every LLM family that is promised to work, 32 wide."""

from tests.conftest import LLAMA, PHI

UNTIED = {**LLAMA, "tie_word_embeddings": False}
HEADS = {"head_dim": 8}
OPENELM = {"model_type": "openelm", "model_dim": 32, "head_dim": 8, "num_transformer_layers": 2}
OPENELM |= {"ffn_multipliers": [0.5, 2.0], "ffn_dim_divisor": 16, "num_gqa_groups": 2, "normalize_qk_projections": True}
OPENELM |= {"qkv_multipliers": [0.5, 1.0], "share_input_output_layers": True}
LLMS = {
    "phi": PHI,
    "phi3": {**UNTIED, "model_type": "phi3"},
    "llama": UNTIED,  # TinyLlama
    "smollm2": LLAMA,
    "stablelm": {**UNTIED, "model_type": "stablelm", "use_qkv_bias": True},
    "gemma": {**LLAMA, **HEADS, "model_type": "gemma"},
    "gemma2": {**LLAMA, **HEADS, "model_type": "gemma2"},
    "gemma3_text": {**LLAMA, **HEADS, "model_type": "gemma3_text"},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, **HEADS, "model_type": "qwen3"},
    "smollm3": {**LLAMA, "model_type": "smollm3"},
    "olmo2": {**UNTIED, "model_type": "olmo2"},
    "mistral": {**UNTIED, "model_type": "mistral"},
    "granite": {**LLAMA, "model_type": "granite", "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": {**LLAMA, "model_type": "cohere", "logit_scale": 0.25},
    "openelm": OPENELM,
}
