"""Small LLMs of every kind that the engine supports, and questions that share images."""

import random

from tests.conftest import LLAMA, PHI
from tests.tiny_session import PICTURES, WORDS
from tinyllava.data.sample import Message, Sample

BASE = {key: LLAMA[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
GROUPED = {**BASE, "num_key_value_heads": 2}
LLMS = {
    "llama": LLAMA,
    "phi": PHI,  # rotates half of each head; its output head has a bias
    "qwen2": {"model_type": "qwen2", **GROUPED},
    "gemma": {"model_type": "gemma", **BASE, "num_key_value_heads": 1, "head_dim": 8},  # scales its embeddings
    # every layer, or every other one, sees the last 16 positions: less than a prefix
    "mistral": {"model_type": "mistral", **GROUPED, "sliding_window": 16},
    "gemma3": {
        "model_type": "gemma3_text",
        **GROUPED,
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # learned positions: one token of padding too many, and every answer is another
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False},
    "openelm": {
        "model_type": "openelm",
        "model_dim": 32,
        "head_dim": 8,
        "num_transformer_layers": 2,
        "num_gqa_groups": 2,
        "ffn_dim_divisor": 16,
        "normalize_qk_projections": True,
    },
}
# LLMs whose past is more than keys and values: transformers' `generate` answers for them.
OTHERS = {
    "lfm2": {
        "model_type": "lfm2",
        **GROUPED,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "qwen3_next": {
        "model_type": "qwen3_next",
        **GROUPED,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 0,
        "mlp_only_layers": [0, 1],
    },
}


def grouped(picture_count: int, seed: int = 0) -> list[Sample]:
    """Questions of several lengths: six on each image, some on two images, some on none, some with a system message."""
    rng, samples = random.Random(seed), []
    for number in range(picture_count):
        for at in range(6):
            words = " ".join(rng.choices(WORDS, k=rng.randint(1, 3)))
            samples.append(Sample([Message("user", f"<image>\n{words} {at}")], [PICTURES[number]]))
    both = PICTURES[:2]
    samples += [Sample([Message("user", f"<image>\n{word} or <image>?")], both) for word in WORDS]
    samples += [Sample([Message("user", f"{word} {at}")], []) for at in range(2) for word in WORDS]
    samples += [
        Sample([Message("system", "Be brief."), Message("user", f"<image>\n{word}")], PICTURES[:1]) for word in WORDS
    ]
    return samples
