"""Sharded weights (ZeRO-3, FSDP): check that a stage needs nothing that they cannot do, and forget them after it."""

import os
from collections.abc import Mapping

from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tinyllava.errors import UserError
from tinyllava.tuning import Selection

# What a launcher sets, such as `accelerate launch --use_fsdp`. TrainingArguments sets the same variables.
ENGINES = {name: os.environ.get(name, "false") for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")}


def forget_engine() -> None:
    """Forget the engine of the stage before.

    Libraries keep it for the whole process: ZeRO-3 would build the next model in shards, and FSDP would shard the
    training of a stage that does not ask for it.
    """
    unset_hf_deepspeed_config()
    os.environ.update(ENGINES)


def check_sharding(selections: Mapping[str, Selection], args: TrainingArguments) -> None:
    """Raise UserError for a tuning that cannot train sharded weights, if `args` shard them."""
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    for part, selection in selections.items():
        if selection.quantised and (zero3 or args.fsdp):
            engine = "ZeRO-3" if zero3 else "FSDP"
            raise UserError(f"the {part} is quantised, and {engine} cannot shard packed weights. Use zero2 or DDP.")
        # A hook masks their gradient (train_rows), and FSDP replaces the parameters that have the hook.
        if selection.rows and args.fsdp:
            raise UserError(f"FSDP cannot train single rows of the {part}. Use zero2, zero3 or DDP.")
