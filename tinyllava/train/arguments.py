"""TrainingArguments of a stage: its `trainer:` section, and our defaults for what it leaves out."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from tinyllava.config import Stage

DEEPSPEED = {  # {name: settings} for `deepspeed: NAME` in `trainer:`
    "zero2": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    "zero3": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,  # without it no weights are written at all
    },
}
LARGEST_MICRO_BATCH = 16  # by default; trainer.per_device_train_batch_size can be larger


def make_arguments(stage: Stage, output: Path, seed: int) -> TrainingArguments:
    """The stage's `trainer:` section as TrainingArguments, with our defaults for what it leaves out.

    Accumulation follows from `global_batch_size`, the number of devices and the micro-batch.
    """
    options = dict(stage.trainer)
    if options.get("deepspeed") in DEEPSPEED:
        options["deepspeed"] = make_deepspeed_config(options["deepspeed"])
    world = int(os.environ.get("WORLD_SIZE", 1))
    micro = options.setdefault("per_device_train_batch_size", choose_micro_batch(stage.global_batch_size, world))
    defaults = {
        "report_to": "tensorboard",
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "eval_strategy": "no" if stage.validation is None else "steps",
        "per_device_eval_batch_size": micro,
        "ddp_find_unused_parameters": False,  # all trained parameters are in every graph (make_idle_features)
        "dataloader_num_workers": max(1, min(8, (os.cpu_count() or 1) // world)),
        "use_cpu": not torch.cuda.is_available() and not torch.backends.mps.is_available(),
    }
    return TrainingArguments(
        **{**defaults, **options},
        output_dir=str(output),
        seed=seed,
        data_seed=seed,
        gradient_accumulation_steps=max(1, stage.global_batch_size // (world * micro)),
        remove_unused_columns=False,  # HF would drop what the model's forward does not name, such as "index"
        logging_nan_inf_filter=False,  # a NaN must be visible: training_step raises an error for it
        disable_tqdm=True,  # callbacks.py draws the progress
    )


def make_deepspeed_config(name: str) -> dict[str, Any]:
    """The DeepSpeed configuration for `deepspeed: zero2` or `zero3`."""
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size")
    return {
        **dict.fromkeys(keys, "auto"),  # HF Trainer fills these in from TrainingArguments
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        # The optimiser is the Trainer's, with a group per part. DeepSpeed would reject it, or replace it on a CPU.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": DEEPSPEED[name],
    }


def choose_micro_batch(global_batch_size: int, world: int) -> int:
    """The largest batch per device, up to LARGEST_MICRO_BATCH, that divides a device's share of the global batch."""
    share = max(1, global_batch_size // world)
    return max(size for size in range(1, min(LARGEST_MICRO_BATCH, share) + 1) if share % size == 0)
