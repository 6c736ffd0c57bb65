"""Print the memory that each stage of the published recipes needs on each device, as a Markdown table.

    python -m perf.memory                      # all rows, three minutes on one core
    python -m perf.memory phi2-siglip-base     # these recipes

Nothing is downloaded: the sizes below are those of the models' config.json on the Hub. A row is for micro-batches of
the recipe, as long as the longest possible sample. The arithmetic and its sources are in tinyllava/memory.py.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tinyllava.commands.stand_ins import make_stand_ins
from tinyllava.config import Recipe, load_recipe
from tinyllava.console import output
from tinyllava.guards.shortage import count_activations, measure_weights
from tinyllava.memory import GIB, compute_memory
from tinyllava.train.stage import prepare_stage
from tinyllava.vision_towers import join_tower_configs, split_tower_name

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "microsoft/phi-2": ({"model_type": "phi", "vocab_size": 51200}, (2560, 10240, 32, 32)),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        {"model_type": "llama", "vocab_size": 32000, "num_key_value_heads": 4},
        (2048, 5632, 22, 32),
    ),
    "stabilityai/stablelm-2-zephyr-1_6b": (
        {"model_type": "stablelm", "vocab_size": 100352, "num_key_value_heads": 32},
        (2048, 5632, 24, 32),
    ),
    "google/gemma-2b-it": (
        {"model_type": "gemma", "vocab_size": 256000, "num_key_value_heads": 1, "head_dim": 256},
        (2048, 16384, 18, 8),
    ),
    "Qwen/Qwen2.5-3B": (
        {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True},
        (2048, 11008, 36, 16),
    ),
    "Qwen/Qwen3-0.6B": (
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        (1024, 3072, 28, 16),
    ),
    "google/siglip-so400m-patch14-384": (
        {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
        (1152, 4304, 27, 16),
    ),
    "openai/clip-vit-large-patch14-336": (
        {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
        (1024, 4096, 24, 16),
    ),
    "google/siglip2-base-patch16-384": (
        {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16},
        (768, 3072, 12, 12),
    ),
}
QWEN = (
    {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True},
    (896, 4864, 24, 14),
)
SIZES |= dict.fromkeys(("Qwen/Qwen2-0.5B", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"), QWEN)
SIZES["google/siglip2-so400m-patch14-384"] = SIZES["google/siglip-so400m-patch14-384"]
RECIPES = ("qwen2-0.5b-siglip-base", "qwen2.5-0.5b-siglip-base", "tinyllama-clip-base", "tinyllama-siglip-base")
RECIPES += ("stablelm2-clip-base", "stablelm2-siglip-base", "gemma-2b-siglip-base", "phi2-clip-base")
RECIPES += ("phi2-siglip-base", "phi2-siglip-share", "phi2-siglip-lora", "phi2-siglip-qlora", "qwen2.5-3b-siglip-base")
COLUMNS = [("ddp", 1), ("zero2", 2), ("zero3", 2), ("fsdp", 2), ("ddp", 8), ("zero2", 8), ("zero3", 8), ("fsdp", 8)]
CAPTION, SUPERVISED = 64, 512  # positions of a caption with its end; supervised positions of a long conversation


def make_full_size(name: str, folder: Path) -> Recipe:
    """The recipe with parts of the published sizes, without their weights, and a few made-up records as data."""
    recipe = load_recipe(name, [])
    small, _ = make_stand_ins(recipe, folder)
    fields = small.model_dump(exclude_unset=True)
    fields["model"]["llm"]["config"] = {**get_config(recipe.model.llm.name), "max_position_embeddings": 4096}
    towers = split_tower_name(recipe.model.vision_tower.name)
    configs = [get_config(tower) for tower in towers]
    fields["model"]["vision_tower"]["config"] = join_tower_configs(recipe.model.vision_tower.name, configs)
    for stage in fields["stages"].values():
        stage.get("trainer", {}).pop("deepspeed", None)
    return Recipe.model_validate(fields)


def get_config(name: str) -> dict[str, Any]:
    """The fields of a config of the published sizes."""
    fields, sizes = SIZES[name]
    return {**fields, **dict(zip(NAMES, sizes, strict=True))}


def make_row(recipe: Recipe, stage: str) -> list[str]:
    """The cells of one stage: micro-batch, positions, and GiB for each column."""
    setup = prepare_stage(recipe, stage, empty=True)
    model, args, images = setup.vlm.model, setup.args, setup.vlm.processor.tokens_per_image
    is_captions = setup.stage.template == "pretrain"
    length = images + CAPTION if is_captions else setup.stage.max_length or recipe.model.max_length
    labels = torch.full((length,), -100)
    labels[-(CAPTION if is_captions else SUPERVISED) :] = 1
    side = model.config.image_size
    item = {"input_ids": labels, "labels": labels, "pixel_values": torch.zeros(1, 3, side, side, dtype=torch.uint8)}
    activations = count_activations(model, item, args.per_device_train_batch_size, args)
    weights, is_half = measure_weights(model), args.bf16 or args.fp16
    totals = [compute_memory(weights, activations, *column, is_half=is_half).total for column in COLUMNS]
    cells = [f"{args.per_device_train_batch_size} x {length:,}", f"{activations / GIB:.1f}"]
    return cells + [f"{total / GIB:.1f}" for total in totals]


def main() -> None:
    """Print a row for each stage of each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    heads = ["recipe", "stage", "micro-batch", "activations"] + [f"{engine}, {count}" for engine, count in COLUMNS]
    lines = [heads, ["---"] * len(heads)]
    for name in parser.parse_args().recipes:
        with TemporaryDirectory() as folder:
            recipe = make_full_size(name, Path(folder))
            lines += [[name, stage, *make_row(recipe, stage)] for stage in recipe.stages]
    for cells in lines:
        output.print(f"| {' | '.join(cells)} |", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
