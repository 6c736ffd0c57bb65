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
from tinyllava.config.trainer_fields import RULES, check_trainer
from tinyllava.errors import UserError
from tinyllava.factory import suggest_known, suggest_nearest
from tinyllava.train.plan import Plan

SCHEDULED = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # what the Trainer gives a scheduler
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
    may_stop, saving = stage.early_stopping is not None, options.get("save_strategy")
    keep_best = options.pop("load_best_model_at_end", may_stop and saving != "no")
    compares = keep_best or may_stop or saving == "best"
    defaults = {
        "eval_strategy": "no" if stage.validation is None else "steps",
        "per_device_eval_batch_size": micro,
        "dataloader_num_workers": max(1, min(8, (os.cpu_count() or 1) // world)),
        "use_cpu": not torch.accelerator.is_available(),
    }
    for key, value in {"data_seed": recipe.seed, "metric_for_best_model": "loss" if compares else None}.items():
        options[key] = value if options.get(key) is None else options[key]
    accumulation = max(1, stage.global_batch_size // (world * micro))
    ours = {"output_dir": str(output), "seed": recipe.seed, "gradient_accumulation_steps": accumulation}
    ours["ddp_backend"] = options.get("ddp_backend") if world > 1 else None
    try:
        args = TrainingArguments(**{**RULES["defaults"], **defaults, **options, **RULES["ours"], **ours})
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {_shorten(error)}.") from None
    args.load_best_model_at_end = keep_best  # set now: HF requires that save_steps is a multiple of eval_steps
    args._n_gpu = min(1, args.n_gpu)  # a single process trains on one device: DataParallel would split pixels wrongly
    check_arguments(where, stage, args)
    return args


def check_validation(where: str, stage: Stage, options: Mapping[str, Any]) -> None:
    """Raise UserError for options that require a validation loss, if the stage has none or never computes it."""
    never = options.get("eval_strategy") == "no"
    if stage.validation is not None and not never:
        return
    requiring = ["early_stopping"] if stage.early_stopping else []
    pairs = RULES["validated_values"].items()
    requiring += [f"{key}: {options[key]}" for key, values in pairs if options.get(key) in values]
    requiring += [key for key in RULES["validated"] if options.get(key)]
    if requiring:
        missing = "sets `eval_strategy: no`" if never else "has no `validation`"
        raise UserError(f"{where}: {requiring[0]} requires a validation loss, but the stage {missing}. Change either.")


def find_deepspeed_config(where: str, options: Mapping[str, Any]) -> dict[str, Any] | str | None:
    """The DeepSpeed configuration that the options name. Raises UserError for one that does not exist."""
    config = options.get("deepspeed")
    if config is None:
        return None
    if options.get("fsdp"):
        raise UserError(f"{where}: deepspeed and fsdp cannot be used together. Remove one of them.")
    named = RULES["deepspeed"]
    if isinstance(config, str) and config not in named and not (config.startswith("{") or Path(config).is_file()):
        close = suggest_nearest(config, named)
        raise UserError(f"{where}.deepspeed: no file '{config}'{close} Known: {', '.join(named)}, or a JSON file.")
    if find_spec("deepspeed") is None:
        raise UserError(f'{where}.deepspeed requires DeepSpeed: pip install "tinyllava-factory[deepspeed]"')
    return named.get(config, config) if isinstance(config, str) else config


def check_arguments(where: str, stage: Stage, args: TrainingArguments) -> None:
    """Raise UserError for values that TrainingArguments accepts, and that would fail after training has begun."""
    try:
        Plan([1], stage.global_batch_size, args.per_device_train_batch_size, args.world_size)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    checkpointing = args.activation_checkpointing_kwargs or {}
    check_keys(f"{where}.activation_checkpointing_kwargs", checkpointing, RULES["checkpointing"])
    is_cpu = args.device.type == "cpu"
    best, sharded = args.load_best_model_at_end, args.deepspeed or args.fsdp
    held_out = {float: stage.data, list: stage.validation}.get(type(stage.validation), ())
    streams, unread = (any(spec.streaming for spec in specs) for specs in (stage.data, held_out))
    faults = {
        "load_best_model_at_end requires checkpoints: `save_strategy: best`": best and args.save_strategy == "no",
        "load_best_model_at_end cannot use `save_only_model` of shards": best and args.save_only_model and sharded,
        "fp16 requires a GPU: set `bf16: true`, or remove it": args.fp16 and is_cpu,
        "activation_checkpointing_kwargs: offload requires a GPU": is_cpu and checkpointing.get("offload"),
        "activation_checkpointing_kwargs: every_n_layers is 1 or more": checkpointing.get("every_n_layers")
        in (0, False),
        "fsdp_config has no effect without `fsdp: true`": args.fsdp_config and not args.fsdp,
        "validation data cannot stream. List it under `validation:` without `streaming: true`": unread,
        "streaming data requires `max_steps`: its length is not known": streams and args.max_steps <= 0,
    }
    for fault in (fault for fault, applies in faults.items() if applies):
        raise UserError(f"{where}: {fault}.")
    args.report_to = [name for name in args.report_to if name]  # `report_to: null`
    available = get_available_reporting_integrations()
    for name in (name for name in args.report_to if name not in available):
        close = "." if name in INTEGRATION_TO_CALLBACK else suggest_nearest(name, INTEGRATION_TO_CALLBACK)
        raise UserError(f"{where}.report_to: {name} is not installed{close} Installed: {', '.join(available)}, none.")
    check_optimizer(where, args)


def check_optimizer(where: str, args: TrainingArguments) -> None:
    """Train a weight for a step, to see that optimiser and scheduler are installed, and use all of their options."""
    name, scheduler, key = args.optim.value, args.lr_scheduler_type.value, "optim"
    if name.startswith(tuple(RULES["own_groups"])):
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
        own = [name for name in parameters if name not in SCHEDULED]
        check_keys(f"{where}.{key}", args.lr_scheduler_kwargs, args.lr_scheduler_kwargs if "kwargs" in own else own)
        schedule = get_scheduler(scheduler, optimizer, args.get_warmup_steps(1000), 1000, args.lr_scheduler_kwargs)
        losses = [1.0] if scheduler in RULES["validated_values"]["lr_scheduler_type"] else []
        for _ in range(1000):  # some options fail late
            optimizer.step()
            schedule.step(*losses)
            if not 0 <= (lr := optimizer.param_groups[0]["lr"]) < float("inf"):
                raise ValueError(f"the learning rate becomes {lr}")
    except (ImportError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{where}.{key}: {scheduler if key != 'optim' else name}: {_shorten(error)}.") from None
    if ignored:
        unset = str(getattr(TrainingArguments, ignored, None)).replace("None", "null")  # a recipe can inherit the key
        raise UserError(f"{where}.{ignored} has no effect with {name} and {scheduler}. Remove it, or set {unset}.")


def check_keys(where: str, options: Any, known: Sequence[str]) -> None:
    """Raise UserError unless `options` are a mapping with known keys."""
    if options is not None and not isinstance(options, dict):
        raise UserError(f"{where}: expected a mapping, found '{str(options)[:80]}'.")
    for key in options or ():
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{suggest_known(key, known)}")


def find_ignored_options(args: TrainingArguments, used: Mapping[str, Any]) -> str | None:
    """The first option that neither the optimiser nor the scheduler uses. used: the options of the optimiser."""
    ignored = [key for key in RULES["ignored"].get(args.lr_scheduler_type.value, ()) if getattr(args, key)]
    for key, option in {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}.items():
        if option not in used and getattr(args, key) != getattr(TrainingArguments, key):
            ignored.append(key)
    pairs = args.optim_args.split(",") if args.optim_args else []
    without = copy.copy(args)
    for pair in pairs:
        without.optim_args = ",".join(other for other in pairs if other is not pair)
        if Trainer.get_optimizer_cls_and_kwargs(without)[1] == used:
            ignored.append(f"optim_args: {pair.strip()}")
    return next(iter(ignored), None)


def _shorten(error: Exception) -> str:
    """The message of another library in one line, with the names of our keys."""
    return " ".join(str(error).split()).replace("--", "")[:300].rstrip(".")


def choose_micro_batch(global_batch_size: int, world: int) -> int:
    """The largest batch per device, up to LARGEST_MICRO_BATCH, that divides a device's share of the global batch."""
    share = max(1, global_batch_size // world)
    return max(size for size in range(1, min(LARGEST_MICRO_BATCH, share) + 1) if share % size == 0)
