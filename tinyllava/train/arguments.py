"""TrainingArguments of a stage: its `trainer:` section, our defaults for what it leaves out, and the checks of both."""

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

from tinyllava.config import Recipe, Stage
from tinyllava.config.trainer_fields import check_trainer
from tinyllava.errors import UserError
from tinyllava.factory import suggest_nearest
from tinyllava.train.plan import Plan

DEEPSPEED = {  # {name: settings} for `deepspeed: NAME` in `trainer:`
    "zero2": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    "zero3": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,  # without it no weights are written at all
    },
}
# What requires a validation loss: keys with any value, and keys with some values.
VALIDATED_KEYS = ("load_best_model_at_end", "metric_for_best_model", "eval_on_start")
VALIDATED_VALUES = {"save_strategy": ["best"], "lr_scheduler_type": ["reduce_lr_on_plateau", "greedy"]}
# Optimisers that make parameter groups themselves, or that evaluate with other weights than they train.
OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo", "schedule_free")
IGNORED = {  # options that a scheduler ignores
    "constant": ["warmup_steps", "lr_scheduler_kwargs"],
    "constant_with_warmup": ["lr_scheduler_kwargs"],
    "reduce_lr_on_plateau": ["warmup_steps"],
    "greedy": ["warmup_steps"],
}
CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "early_stop", "every_n_layers", "offload")
LARGEST_MICRO_BATCH = 16  # by default; trainer.per_device_train_batch_size can be larger


def make_arguments(recipe: Recipe, name: str, output: Path) -> TrainingArguments:
    """The `trainer:` section of the stage `name` as TrainingArguments, with our defaults for what it leaves out.

    Accumulation follows from `global_batch_size`, the number of devices and the micro-batch. output: the directory of
    the stage. Raises UserError for everything that would fail later, or have no effect.
    """
    stage, where = recipe.stages[name], f"stages.{name}.trainer"
    options = check_trainer(where, stage.trainer)
    check_validation(where, stage, options)
    options["deepspeed"] = find_deepspeed_config(where, options)
    world = int(os.environ.get("WORLD_SIZE", 1))
    micro = options.setdefault("per_device_train_batch_size", choose_micro_batch(stage.global_batch_size, world))
    tracks_best = stage.early_stopping is not None or options.get("save_strategy") == "best"
    keep_best = options.pop("load_best_model_at_end", stage.early_stopping is not None)
    defaults = {
        "report_to": "tensorboard",
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "eval_strategy": "no" if stage.validation is None else "steps",
        "per_device_eval_batch_size": micro,
        "data_seed": recipe.seed,
        "ddp_find_unused_parameters": False,  # all trained parameters are in every graph (make_idle_features)
        "dataloader_num_workers": max(1, min(8, (os.cpu_count() or 1) // world)),
        "use_cpu": not torch.cuda.is_available() and not torch.backends.mps.is_available(),
        "metric_for_best_model": "loss" if keep_best or tracks_best else None,
    }
    ours = {
        "output_dir": str(output),
        "seed": recipe.seed,
        "gradient_accumulation_steps": max(1, stage.global_batch_size // (world * micro)),
        "remove_unused_columns": False,  # HF would drop what the model's forward does not name, such as "index"
        "logging_nan_inf_filter": False,  # a NaN must be visible: training_step raises an error for it
        "disable_tqdm": True,  # callbacks.py draws the progress
        "restore_callback_states_from_checkpoint": True,  # the patience of early stopping
    }
    try:
        args = TrainingArguments(**{**defaults, **options, **ours})
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {_shorten(error)}.") from None
    args.load_best_model_at_end = keep_best  # set now: HF requires that save_steps is a multiple of eval_steps
    args._n_gpu = min(1, args.n_gpu)  # a single process trains on one device: DataParallel would split pixels wrongly
    check_arguments(where, stage, args)
    return args


def check_validation(where: str, stage: Stage, options: Mapping[str, Any]) -> None:
    """Raise UserError for options that require a validation loss, if the stage has none or never computes it."""
    if stage.validation is not None and options.get("eval_strategy") != "no":
        return
    requiring = [f"{key}: {options[key]}" for key, values in VALIDATED_VALUES.items() if options.get(key) in values]
    requiring += [key for key in VALIDATED_KEYS if options.get(key)]
    if stage.validation is None:
        requiring += [key for key in ("eval_steps", "eval_delay") if options.get(key)]
        requiring += ["eval_strategy"] if options.get("eval_strategy", "no") != "no" else []
    requiring += ["early_stopping"] if stage.early_stopping else []
    if requiring:
        missing = "has no `validation`" if stage.validation is None else "sets `eval_strategy: no`"
        raise UserError(
            f"{where}: {requiring[0]} requires a validation loss, but the stage {missing}."
            f" Add `validation`, or remove {requiring[0]}."
        )


def find_deepspeed_config(where: str, options: Mapping[str, Any]) -> dict[str, Any] | str | None:
    """The DeepSpeed configuration that the options name. Raises UserError for one that does not exist."""
    config = options.get("deepspeed")
    if config is None:
        return None
    if options.get("fsdp"):
        raise UserError(f"{where}: deepspeed and fsdp cannot be used together. Remove one of them.")
    if isinstance(config, str) and config not in DEEPSPEED and not (config.startswith("{") or Path(config).is_file()):
        close = suggest_nearest(config, list(DEEPSPEED))
        raise UserError(f"{where}.deepspeed: no file '{config}'{close} Known: {', '.join(DEEPSPEED)}, or a JSON file.")
    if find_spec("deepspeed") is None:
        raise UserError(f'{where}.deepspeed requires DeepSpeed: pip install "tinyllava-factory[deepspeed]"')
    return make_deepspeed_config(config) if isinstance(config, str) and config in DEEPSPEED else config


def check_arguments(where: str, stage: Stage, args: TrainingArguments) -> None:
    """Raise UserError for values that TrainingArguments accepts, and that would fail after training has begun."""
    try:
        Plan([1], stage.global_batch_size, args.per_device_train_batch_size, args.world_size)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    faults = {
        "load_best_model_at_end saves the best checkpoint, but `save_strategy: no` saves none. Use `best`": (
            args.load_best_model_at_end and args.save_strategy == "no"
        ),
        "load_best_model_at_end with sharded weights requires `save_only_model: false`": (
            args.load_best_model_at_end and args.save_only_model and (args.deepspeed or args.fsdp)
        ),
        "fp16 requires a GPU. Set `bf16: true`, or remove it": args.fp16 and args.device.type == "cpu",
        "fsdp_config has no effect without fsdp. Set `fsdp: full_shard`, or remove it": (
            args.fsdp_config and not args.fsdp
        ),
    }
    for fault in (fault for fault, applies in faults.items() if applies):
        raise UserError(f"{where}: {fault}.")
    check_keys(f"{where}.activation_checkpointing_kwargs", args.activation_checkpointing_kwargs, CHECKPOINTING)
    available = get_available_reporting_integrations()
    for name in (name for name in args.report_to if name not in available):
        close = "." if name in INTEGRATION_TO_CALLBACK else suggest_nearest(name, list(INTEGRATION_TO_CALLBACK))
        raise UserError(f"{where}.report_to: {name} is not installed{close} Installed: {', '.join(available)}, none.")
    check_optimizer(where, args)


def check_optimizer(where: str, args: TrainingArguments) -> None:
    """Train a weight for a step, to see that optimiser and scheduler are installed, and use all of their options."""
    name, scheduler, key = args.optim.value, args.lr_scheduler_type.value, "optim"
    if name.startswith(OWN_GROUPS):
        raise UserError(f"{where}.optim: {name} does not work with a parameter group for each part. Use adamw_torch.")
    weight = torch.nn.Parameter(torch.zeros(4096, device=args.device))  # 8-bit optimisers hold smaller ones in fp32
    weight.grad = torch.zeros_like(weight)
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([{"params": [weight], "weight_decay": args.weight_decay}], **options)
        optimizer.step()
        ignored = find_ignored_options(args, options)
        key = "lr_scheduler_kwargs"
        parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type]).parameters
        own = [name for name in parameters if name not in ("optimizer", "num_warmup_steps", "num_training_steps")]
        check_keys(f"{where}.{key}", args.lr_scheduler_kwargs, args.lr_scheduler_kwargs if "kwargs" in own else own)
        get_scheduler(scheduler, optimizer, 0, 10**9, args.lr_scheduler_kwargs)
    except (ImportError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{where}.{key}: {scheduler if key != 'optim' else name}: {_shorten(error)}.") from None
    if ignored:
        raise UserError(f"{where}.{ignored} has no effect with {name} and {scheduler}. Remove it, or choose another.")


def check_keys(where: str, options: Any, known: Sequence[str]) -> None:
    """Raise UserError unless `options` are a mapping with known keys."""
    if options is not None and not isinstance(options, dict):
        raise UserError(f"{where}: expected a mapping, found '{str(options)[:80]}'.")
    for key in options or ():
        if key not in known:
            raise UserError(
                f"{where}: unknown key '{key}'{suggest_nearest(key, list(known))} Known: {', '.join(known)}."
            )


def find_ignored_options(args: TrainingArguments, used: Mapping[str, Any]) -> str | None:
    """The first option that neither the optimiser nor the scheduler uses. used: the options of the optimiser."""
    ignored = [key for key in IGNORED.get(args.lr_scheduler_type.value, ()) if getattr(args, key)]
    for key, option in {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}.items():
        if option not in used and getattr(args, key) != getattr(TrainingArguments, key):
            ignored.append(key)
    pairs = [pair for pair in (args.optim_args or "").split(",") if pair]
    without = copy.copy(args)
    for pair in pairs:
        without.optim_args = ",".join(other for other in pairs if other is not pair)
        if Trainer.get_optimizer_cls_and_kwargs(without)[1] == used:
            ignored.append(f"optim_args: {pair.strip()}")
    return next(iter(ignored), None)


def _shorten(error: Exception) -> str:
    """The message of another library in one line, with the names of our keys."""
    return " ".join(str(error).split()).replace("--", "")[:300].rstrip(".")


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
