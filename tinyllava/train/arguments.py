"""TrainingArguments of a stage: what its `trainer:` section says, and our defaults for the rest."""

import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from tinyllava.config import Stage

DEEPSPEED = {
    "zero2": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    "zero3": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,  # without it no weights are written at all
    },
}


def training_arguments(stage: Stage, output: Path, seed: int) -> TrainingArguments:
    """The stage's `trainer:` section as TrainingArguments; whatever it does not say gets the defaults below.

    `deepspeed: zero2` and `zero3` are short for the usual configurations. Accumulation follows from
    `global_batch_size`.
    """
    options = dict(stage.trainer)
    if options.get("deepspeed") in DEEPSPEED:
        auto = dict.fromkeys(
            ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size"),
            "auto",
        )
        options["deepspeed"] = {
            **auto,
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": DEEPSPEED[options["deepspeed"]],
        }
    world = int(os.environ.get("WORLD_SIZE", 1))
    micro = options.setdefault("per_device_train_batch_size", micro_batch(stage.global_batch_size, world))
    defaults = {
        "report_to": "tensorboard",
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "eval_strategy": "no" if stage.validation is None else "steps",
        "per_device_eval_batch_size": micro,
        "ddp_find_unused_parameters": False,  # every trained parameter is in every graph (idle_features)
        "dataloader_num_workers": max(1, min(8, (os.cpu_count() or 1) // world)),
        "use_cpu": not torch.cuda.is_available() and not torch.backends.mps.is_available(),
    }
    return TrainingArguments(
        **{**defaults, **options},
        output_dir=str(output),
        seed=seed,
        data_seed=seed,
        gradient_accumulation_steps=max(1, stage.global_batch_size // (world * micro)),
        remove_unused_columns=False,
        logging_nan_inf_filter=False,  # a NaN is an error here, not a number to hide
        disable_tqdm=True,  # report.py draws the progress
    )


def micro_batch(global_batch_size: int, world: int) -> int:
    """The largest per-device batch up to 16 that divides a device's share of the global batch."""
    share = max(1, global_batch_size // world)
    return max(size for size in range(1, min(16, share) + 1) if share % size == 0)
