"""Every field of TrainingArguments works, is ours, or is refused with its reason, before anything trains."""

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from tests.cli_tools import CommandResult, run_command_line  # noqa: F401 (a fixture)
from tests.cli_tools import recipe as make_two_stages
from tests.train.tiny_run import recipe
from tinyllava.config.schema import EarlyStopping
from tinyllava.config.trainer_fields import REFUSED, RULES
from tinyllava.errors import UserError
from tinyllava.train import stage
from tinyllava.train.arguments import make_arguments

# Passed on and used, with a value that is not the default.
WORKS = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "bf16": True,
    "data_seed": 3,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_num_workers": 2,
    "dataloader_pin_memory": False,
    "dataloader_prefetch_factor": 3,
    "ddp_backend": "gloo",
    "ddp_broadcast_buffers": False,
    "ddp_bucket_cap_mb": 20,
    "ddp_find_unused_parameters": True,
    "ddp_static_graph": True,
    "ddp_timeout": 60,
    "eval_delay": 2,
    "eval_on_start": True,
    "eval_steps": 3,
    "eval_strategy": "steps",
    "full_determinism": True,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "greater_is_better": False,
    "include_num_input_tokens_seen": "all",
    "label_smoothing_factor": 0.1,
    "learning_rate": 1e-3,
    "load_best_model_at_end": True,
    "log_level": "error",
    "log_level_replica": "error",
    "log_on_each_node": False,
    "logging_first_step": True,
    "logging_steps": 7,
    "logging_strategy": "epoch",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "lr_scheduler_type": "cosine_with_min_lr",
    "max_grad_norm": 0.5,
    "max_steps": 9,
    "metric_for_best_model": "eval_loss",
    "neftune_noise_alpha": 5.0,
    "num_train_epochs": 2.0,
    "optim": "adamw_torch",
    "per_device_eval_batch_size": 2,
    "per_device_train_batch_size": 2,
    "project": "mine",
    "run_name": "mine",
    "save_only_model": True,
    "save_steps": 5,
    "save_strategy": "steps",
    "save_total_limit": 1,
    "skip_memory_metrics": False,
    "torch_empty_cache_steps": 4,
    "trackio_bucket_id": "me/bucket",
    "trackio_space_id": "me/space",
    "trackio_static_space_id": "me/static",
    "use_cpu": True,
    "warmup_steps": 0.1,
    "weight_decay": 0.1,
}
# These work as well, but not on every machine, or not beside the others.
WORKS_ALONE = ["debug", "deepspeed", "fp16", "fsdp", "fsdp_config", "optim_args", "report_to", "tf32"]
WORKS_ALONE += ["torch_compile", "torch_compile_backend", "torch_compile_mode"]
# The trainer does this whatever the value is, and the values say nothing else.
ALWAYS = ["dataloader_persistent_workers", "do_train", "logging_nan_inf_filter", "prediction_loss_only"]
ALWAYS += ["remove_unused_columns", "restore_callback_states_from_checkpoint"]
# Another value than the default of each refused or replaced field, and words of the reason.
NOT_HERE = {
    "accelerator_config": ({"split_batches": True}, "planner"),
    "auto_find_batch_size": (True, "per_device_train_batch_size"),
    "average_tokens_across_devices": (False, "global batch"),
    "batch_eval_metrics": (True, "only the loss"),
    "bf16_full_eval": (True, "precision of training"),
    "dataloader_drop_last": (True, "planner"),
    "dataloader_in_order": (False, "planner"),
    "disable_tqdm": (False, "progress bar"),
    "do_eval": (True, "validation:"),
    "do_predict": (True, "eval:"),
    "enable_jit_checkpoint": (True, "save_steps"),
    "eval_accumulation_steps": (2, "only the loss"),
    "eval_do_concat_batches": (False, "only the loss"),
    "eval_use_gather_object": (True, "only the loss"),
    "fp16_full_eval": (True, "precision of training"),
    "gradient_accumulation_steps": (4, "global_batch_size"),
    "hub_always_push": (True, "hf upload"),
    "hub_model_id": ("me/model", "hf upload"),
    "hub_private_repo": (True, "hf upload"),
    "hub_revision": ("main", "hf upload"),
    "hub_strategy": ("end", "hf upload"),
    "hub_token": ("secret", "hf upload"),
    "ignore_data_skip": (True, "exact step"),
    "include_for_metrics": (["loss"], "only the loss"),
    "label_names": (["labels"], "only the loss"),
    "length_column_name": ("size", "planner"),
    "liger_kernel_config": ({"rope": True}, "Liger"),
    "local_rank": (0, "torchrun"),
    "optim_target_modules": ("all-linear", "parameter group"),
    "output_dir": ("elsewhere", "--output"),
    "parallelism_config": ({"tp_size": 2}, "DDP"),
    "push_to_hub": (True, "hf upload"),
    "resume_from_checkpoint": ("checkpoint-2", "same command"),
    "save_on_each_node": (True, "share"),
    "seed": (3, "`seed`"),
    "train_sampling_strategy": ("group_by_length", "planner"),
    "use_cache": (True, "cache"),
    "use_liger_kernel": (True, "Liger"),
}
FIELDS = {field.name: field for field in fields(TrainingArguments)}


def make(validation: bool = True, early_stopping: dict | None = None, **trainer: object) -> TrainingArguments:
    """The arguments of a stage with these options."""
    made = recipe(Path("nowhere"), stages=("finetune",))
    tested = made.stages["finetune"]
    tested.trainer = {"report_to": "none", "per_device_train_batch_size": 4, **trainer}
    tested.validation = 0.2 if validation else None
    tested.early_stopping = EarlyStopping(**early_stopping) if early_stopping else None
    return make_arguments(made, "finetune", Path("nowhere"))


def get_default(name: str) -> object:
    field = FIELDS[name]
    return field.default if field.default_factory is MISSING else field.default_factory()


def test_the_table_has_every_field_once() -> None:
    """A field that a newer transformers adds must be sorted in: read what HF's Trainer does with it first."""
    listed = [*WORKS, *WORKS_ALONE, *ALWAYS, *NOT_HERE]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(FIELDS), set(listed) ^ set(FIELDS)
    assert set(NOT_HERE) == {*REFUSED, *RULES["replaced"]}


@pytest.mark.parametrize("name", NOT_HERE)
def test_a_field_without_effect_is_refused_with_the_reason(name: str) -> None:
    value, reason = NOT_HERE[name]
    assert value != get_default(name)
    with pytest.raises(UserError) as error:
        make(**{name: value})
    message = str(error.value)
    assert f"stages.finetune.trainer.{name}" in message and reason in message and "\n" not in message, message


def test_a_field_with_its_default_value_is_accepted() -> None:
    defaults = {name: get_default(name) for name in FIELDS}
    args = make(**{**defaults, "group_by_length": False, "warmup_ratio": 0.0, "overwrite_output_dir": False})
    changed = {"use_cpu", "load_best_model_at_end", *RULES["ours"], *RULES["replaced"], "data_seed"}
    for name in set(defaults) - changed:
        expected = getattr(TrainingArguments(output_dir="nowhere"), name)
        assert getattr(args, name) == expected or name in ("accelerator_config", "per_device_train_batch_size"), name


def test_a_field_that_works_arrives_unchanged() -> None:
    args = make(**WORKS)
    for name, value in WORKS.items():
        assert getattr(args, name) == value or name == "ddp_backend", name  # one process has no backend
    assert make(learning_rate="1e-4", bf16="false").learning_rate == 1e-4  # a number in quotes
    assert make(optim="sgd", optim_args="momentum=0.9").optim_args == "momentum=0.9"
    assert make(torch_compile_backend="eager").torch_compile
    assert make(fsdp=True).fsdp and make(fsdp="full_shard auto_wrap").fsdp
    assert make(debug="underflow_overflow").debug == ["underflow_overflow"]
    assert make(report_to="tensorboard").report_to == ["tensorboard"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_scheduler_type": "cosin"}, ["lr_scheduler_type", "'cosin'", "did you mean 'cosine'"]),
        ({"optim": "adamw8bit"}, ["optim", "did you mean 'adamw_8bit'"]),
        ({"optim": "grokadamw"}, ["optim", "install"]),
        ({"optim": "galore_adamw"}, ["galore_adamw", "parameter group"]),
        ({"optim": "adamw_torch", "optim_args": "x=1"}, ["optim_args: x=1", "no effect"]),
        ({"optim": "sgd", "optim_args": "momentumm=0.9"}, ["optim_args: momentumm=0.9", "no effect"]),
        ({"optim": "sgd", "adam_beta1": 0.8}, ["adam_beta1", "no effect"]),
        ({"adam_beta1": 1.5}, ["optim", "1.5"]),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cyles": 2}}, ["did you mean 'num_cycles'"]),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ["lr_scheduler_kwargs", "min_lr"]),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}}, ["inverse_sqrt", "zero"]),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": -5}}, ["lr_scheduler_kwargs"]),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": "x"}}, ["plateau"]),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1.0}}, ["learning rate becomes -"]),
        ({"optim": "adafactor", "adam_beta2": 0.98}, ["adam_beta2 has no effect", "set 0.999"]),
        ({"mm_projector_lr": 2e-5}, ["not a field", "`tune: {connector: {full: {}, lr: ...}}`"]),
        ({"lora_enable": True}, ["lora_enable", "`tune: {llm: {lora:"]),
        ({"bits": 4}, ["bits", "qlora"]),
        ({"group_by_modality_length": True}, ["group_by_modality_length", "similar lengths"]),
        ({"early_stopping_patience": 3}, ["`early_stopping: {patience: N"]),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0.03}, ["warmup_steps", "no effect", "constant"]),
        ({"lr_scheduler_kwargs": "x"}, ["lr_scheduler_kwargs", "mapping"]),
        ({"learning_rate": -1.0}, ["learning_rate", "-1.0"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "nan"]),
        ({"num_train_epochs": 0}, ["num_train_epochs", "above 0"]),
        ({"max_steps": -5}, ["max_steps", "above 0"]),
        ({"label_smoothing_factor": 1.0}, ["label_smoothing_factor", "below 1"]),
        ({"save_total_limit": 0}, ["save_total_limit"]),
        ({"warmup_ratio": 0.03}, ["warmup_ratio", "`warmup_steps`"]),
        ({"group_by_length": True}, ["group_by_length", "similar lengths"]),
        ({"per_device_train_batch_size": 3}, ["global_batch_size 8", "stages.finetune"]),
        ({"include_num_input_tokens_seen": "non_padding"}, ["include_num_input_tokens_seen", "all"]),
        ({"bf16": True, "fp16": True}, ["fp16", "bf16"]),
        ({"report_to": "wandbb"}, ["report_to", "did you mean 'wandb'"]),
        ({"report_to": "clearml"}, ["report_to", "not installed", "tensorboard"]),
        ({"deepspeed": "zero4"}, ["deepspeed", "zero2"]),
        ({"fsdp": "full_shrad"}, ["fsdp", "did you mean 'full_shard'"]),
        ({"fsdp": True, "deepspeed": "zero2"}, ["deepspeed and fsdp"]),
        ({"fsdp_config": {"version": 2}}, ["fsdp_config", "without"]),
        ({"activation_checkpointing_kwargs": {"use_reentrent": True}}, ["did you mean 'use_reentrant'"]),
        ({"dataloader_num_workers": 0, "dataloader_prefetch_factor": 2}, ["dataloader_prefetch_factor"]),
        ({"metric_for_best_model": "eval_los"}, ["did you mean 'eval_loss'"]),
        ({"metric_for_best_model": "accuracy"}, ["Known: loss, eval_loss"]),
        ({"greater_is_better": True}, ["greater_is_better"]),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, ["load_best_model_at_end", "save_strategy"]),
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, ["load_best_model_at_end", "eval_strategy: no"]),
        ({"load_best_model_at_end": True, "validation": False}, ["load_best_model_at_end", "no `validation`"]),
        ({"early_stopping": {"patience": 2}, "validation": False}, ["early_stopping", "no `validation`"]),
        ({"save_strategy": "best", "validation": False}, ["save_strategy: best", "no `validation`"]),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "validation": False}, ["plateau", "no `validation`"]),
        ({"eval_on_start": True, "validation": False}, ["eval_on_start", "no `validation`"]),
        ({"eval_strategy": "epoch", "validation": False}, ["eval_strategy: epoch", "no `validation`"]),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_before_anything_is_loaded(options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        make(**options)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize("command", ["train", "look"])
def test_a_stream_without_an_end_or_for_validation_stops_the_run_before_the_first_stage(
    command: str, tinyllava: Callable[..., CommandResult], pictures: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    epochs, steps = ({"trainer": {key: 1}} for key in ("num_train_epochs", "max_steps"))
    for change, word in ({"validation": None, **epochs}, "max_steps"), ({"validation": 0.5, **steps}, "cannot stream"):
        content = make_two_stages(pictures)
        late = list(content["stages"].values())[1]
        late = {**late, "data": [{**late["data"][0], "streaming": True}]}
        path.write_text(json.dumps({**content, "stages": {**content["stages"], "late": {**late, **change}}}))
        output = ["--output", tmp_path / "run"] if command == "train" else []
        result = tinyllava(command, path, *output)
        assert result.code == 2 and word in result.err and result.err.count("\n") <= 2, result.err
        assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16 and offloading")
def test_what_the_device_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match="fp16 requires a GPU"):
        make(fp16=True)
    with pytest.raises(UserError, match="tf32"):
        make(tf32=True)
    with pytest.raises(UserError, match="offload requires a GPU"):
        make(activation_checkpointing=True, activation_checkpointing_kwargs={"offload": True})


@pytest.mark.parametrize("command", ["train", "look"])
def test_a_wrong_value_of_the_second_stage_stops_the_run_before_the_first(
    command: str, tinyllava: Callable[..., CommandResult], pictures: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(make_two_stages(pictures)))
    names = list(make_two_stages(pictures)["stages"])
    output = ["--output", tmp_path / "run"] if command == "train" else []
    wrong = {
        "trainer.lr_scheduler_kwargs={cycles: 2}": "cycles",
        "trainer.load_best_model_at_end=true": "best",
        "data.0.streaming=true": "streaming data requires `max_steps`",
    }
    for change, word in wrong.items():
        second = f"stages.{names[1]}"
        result = tinyllava(command, path, *output, f"{second}.trainer.max_steps=-1", f"{second}.{change}")
        assert result.code == 2 and f"stages.{names[1]}.trainer" in result.err and word in result.err, result.err
        assert "Traceback" not in result.err and not (tmp_path / "run" / names[0]).exists()


def test_sharding_in_one_process_is_refused_by_train_and_shown_by_look(pictures: Path) -> None:
    sharded = recipe(pictures, fsdp=True)
    stage.check_stages(sharded, sharded.stages, trains=False)
    with pytest.raises(UserError, match=r"stages.finetune.trainer.fsdp requires several processes.*torchrun"):
        stage.check_stages(sharded, sharded.stages)


def test_passed_fields_have_their_effect(pictures: Path, tmp_path: Path) -> None:
    options = {
        "max_steps": 4,
        "eval_on_start": True,
        "eval_delay": 3,
        "eval_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.5},
        "include_num_input_tokens_seen": "all",
        "save_strategy": "no",
    }
    stage.run(recipe(pictures, {"llm": {"full": {}, "lr": 1e-3}}, stages=("finetune",), **options), "tiny", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "finetune" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 4]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    rates = [line["lr/connector"] for line in trained]
    assert rates[0] == pytest.approx(1e-2) and 5e-3 <= rates[-1] < 6e-3
    assert trained[-1]["lr/llm"] == pytest.approx(rates[-1] / 10)
    tokens = [line["num_input_tokens_seen"] for line in trained]
    assert 0 < tokens[0] < tokens[-1]


def test_neftune_adds_noise_in_training_only(pictures: Path, tmp_path: Path) -> None:
    first, validated = [], []
    for alpha in (None, 20.0):
        options = {"max_steps": 1, "eval_on_start": True, "neftune_noise_alpha": alpha, "save_strategy": "no"}
        stage.run(recipe(pictures, stages=("finetune",), **options), "tiny", tmp_path / str(alpha))
        text = (tmp_path / str(alpha) / "finetune" / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        first.append(next(line["loss"] for line in lines if "loss" in line))
        validated.append(next(line["eval_loss"] for line in lines if "eval_loss" in line))
    assert validated[0] == validated[1] and abs(first[0] - first[1]) > 1e-4
