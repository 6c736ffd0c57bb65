"""Check the keys and values of `trainer:` against TrainingArguments, to which they are passed.

Our Trainer replaces much of HF's, so some fields of TrainingArguments would have no effect. They are refused with the
reason, unless they have their default value. tests/train/test_arguments.py says of every field what happens to it.
"""

import math
from collections.abc import Iterable
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from tinyllava.errors import UserError
from tinyllava.factory import suggest_nearest

# What sets these instead: another key, or the trainer itself.
REPLACED = {"gradient_accumulation_steps": "global_batch_size", "output_dir": "--output", "seed": "seed"}
# {why fields have no effect here, and what to do: their names}
REASONS = {
    "the planner puts every sample of an epoch into batches of similar length": "accelerator_config"
    " dataloader_drop_last dataloader_in_order group_by_length length_column_name train_sampling_strategy",
    "validation computes only the loss, in the precision of training": "batch_eval_metrics bf16_full_eval"
    " eval_accumulation_steps eval_do_concat_batches eval_use_gather_object fp16_full_eval include_for_metrics"
    " label_names",
    "nothing is uploaded while it trains. Run `hf upload` on the finished checkpoint": "hub_always_push hub_model_id"
    " hub_private_repo hub_revision hub_strategy hub_token push_to_hub",
    "the command and the recipe say what runs: `tinyllava train`, `validation:` and `eval:`": "do_eval do_predict",
    "the same command resumes a run at its exact step": "ignore_data_skip resume_from_checkpoint",
    "a stopped run resumes from its last checkpoint. Set save_steps": "enable_jit_checkpoint",
    "all nodes share the directory of a run": "save_on_each_node",
    "Liger has no kernels for this model, and its loss is computed in chunks already": "liger_kernel_config"
    " use_liger_kernel",
    "training keeps no cache of keys and values": "use_cache",
    "the samples of a step do not depend on memory. Lower per_device_train_batch_size": "auto_find_batch_size",
    "several devices train with DDP, DeepSpeed or FSDP, and torchrun sets the ranks": "local_rank parallelism_config",
    "the loss is always a mean over the tokens of the whole global batch": "average_tokens_across_devices",
    "it is for optimisers that make their own parameter groups, and here every part has its own": "optim_target_modules",
    "the progress bar is not tqdm's": "disable_tqdm",
}
REFUSED = {field: reason for reason, names in REASONS.items() for field in names.split()}
# Fields of earlier versions of transformers, and what to write now.
FORMER = {
    "adafactor": "`optim: adafactor`",
    "evaluation_strategy": "`eval_strategy`",
    "group_by_length": "nothing: the samples of a batch have similar lengths anyway",
    "include_tokens_per_second": "`include_num_input_tokens_seen`",
    "logging_dir": "nothing: TensorBoard's files are in the stage's folder",
    "no_cuda": "`use_cpu`",
    "overwrite_output_dir": "`--overwrite` on the command line",
    "warmup_ratio": "`warmup_steps`: a number below 1 is a share of all steps",
}
# Other values that do what the trainer does anyway.
ALSO_ACCEPTED = {"disable_tqdm": True, "fsdp": False, "include_num_input_tokens_seen": False}
POSITIVE = (
    "max_steps num_train_epochs per_device_train_batch_size per_device_eval_batch_size save_total_limit save_steps"
    " eval_steps logging_steps dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout torch_empty_cache_steps"
).split()
# Values that TrainingArguments itself accepts, and that would be ignored or fail later.
CHOICES = {
    "include_num_input_tokens_seen": ("no", "all"),  # batches have no mask of the padding
    "metric_for_best_model": ("loss", "eval_loss"),
    "greater_is_better": (False,),
    "debug": ("underflow_overflow",),
    "fsdp": (True, "full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "offload", "auto_wrap"),
}


def check_trainer(where: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `trainer:` as TrainingArguments needs them: with the right types, without those that are ours.

    where: the place of `options` in the recipe, for messages. Raises UserError for an unknown key, a key without effect
    and a value that is not valid, with the nearest valid one.
    """
    if not options:
        return {}
    from transformers import TrainingArguments

    hints, known = get_type_hints(TrainingArguments), {field.name: field for field in fields(TrainingArguments)}
    passed = {}
    for key, value in options.items():
        if key not in known:
            if key in FORMER and not value:  # turned off
                continue
            remedy = f" It is a field of an earlier transformers. Write {FORMER[key]}." if key in FORMER else ""
            close = suggest_nearest(key, list(known)) if not remedy else "."
            raise UserError(f"unknown key '{where}.{key}'{close}{remedy or ' Known: the fields of TrainingArguments.'}")
        hint = bool | str | None if key == "fsdp" else hints[key]  # transformers' own hint does not have `fsdp: true`
        value, field = _convert_value(f"{where}.{key}", hint, value), known[key]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default and not (key in ALSO_ACCEPTED and value == ALSO_ACCEPTED[key]):
            _check_value(where, key, value, _list_choices(key, hints[key], field.metadata))
        if key not in REPLACED and key not in REFUSED:
            passed[key] = value
    return passed


def _convert_value(where: str, hint: Any, value: Any) -> Any:
    """The value as the field's type: a number in quotes becomes a number."""
    try:
        return TypeAdapter(hint, config={"arbitrary_types_allowed": True}).validate_python(value)
    except ValidationError:
        kind = str(hint).replace("typing.", "").replace("<class '", "").replace("'>", "")
        raise UserError(f"{where}: expected {kind}, found {value!r}.") from None


def _list_choices(key: str, hint: Any, metadata: Any) -> Iterable[Any]:
    """The valid values of a field; empty if they cannot be listed."""
    enums = [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
    return CHOICES.get(key) or metadata.get("choices") or [member.value for kind in enums for member in kind]


def _check_value(where: str, key: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise UserError when a value that is not the default has no effect, or is not valid."""
    if key in REPLACED:
        raise UserError(f"{where}.{key} follows from `{REPLACED[key]}`. Set `{REPLACED[key]}` instead.")
    if key in REFUSED:
        raise UserError(f"{where}.{key} has no effect here: {REFUSED[key]}. Remove it.")
    choices = [str(choice) for choice in choices]
    # `fsdp: full_shard offload` and `debug` are lists of words.
    for word in str(getattr(value, "value", value)).split() if choices else ():
        if word not in choices:
            close = suggest_nearest(word, choices)
            known = f" Known: {', '.join(choices)}." if close == "." else ""
            raise UserError(f"{where}.{key}: unknown value '{word}'{close}{known}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        lowest = "above 0" if key in POSITIVE else "0 or more"
        if not 0 <= value < math.inf or (key in POSITIVE and value == 0):
            raise UserError(f"{where}.{key}: expected a number {lowest}, found {value}.")
        if key == "label_smoothing_factor" and value >= 1:
            raise UserError(f"{where}.{key}: expected a number below 1, found {value}.")
