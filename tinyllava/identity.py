"""The identity of a run: the settings and the data that decide its result. They cannot change when a run resumes.

How a step is executed (micro-batch, checkpointing, devices, logging, saving) can change at every start. Recipes are
plain mappings here, as in the record of a run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllava.errors import UserError
from tinyllava.runs import REMEDY
from tinyllava.secrets import is_secret_name, mask_settings

# Fields of TrainingArguments that do not change the trained weights, except by rounding and by the random numbers of
# dropout. All other fields, also those of later versions of transformers, belong to the identity.
EXECUTION = frozenset(  # as text, because a list would take a line for each name
    """
    activation_checkpointing activation_checkpointing_kwargs batch_eval_metrics dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend
    ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed
    disable_tqdm do_eval do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay
    eval_do_concat_batches eval_on_start eval_steps eval_strategy eval_use_gather_object fsdp fsdp_config
    full_determinism gradient_checkpointing gradient_checkpointing_kwargs hub_always_push hub_model_id hub_private_repo
    hub_revision hub_strategy hub_token include_for_metrics include_num_input_tokens_seen local_rank log_level
    log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_steps logging_strategy
    per_device_eval_batch_size per_device_train_batch_size prediction_loss_only project push_to_hub report_to
    resume_from_checkpoint run_name save_on_each_node save_only_model save_steps save_strategy save_total_limit
    skip_memory_metrics torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    trackio_bucket_id trackio_space_id trackio_static_space_id use_cache use_cpu
    """.split()  # noqa: SIM905
)
# These decide the result of a stage that keeps its best checkpoint, stops early, or lowers its learning rate by the
# validation loss.
JUDGED = frozenset({"eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy"})


@dataclass
class Difference:
    """A setting that changed. It `decides` if the result depends on it."""

    setting: str
    before: Any
    now: Any
    decides: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The entry of `changes` in the record of a run."""
        return {"setting": self.setting, "before": self.before, "now": self.now}

    def __str__(self) -> str:
        before, now = ("not set" if value is None else str(value) for value in (self.before, self.now))
        return f"{self.setting} {_cut(before)} -> {_cut(now)}"


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def check_same_run(
    directory: Path, runs: Sequence[Mapping[str, Any]], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[Difference]:
    """What changed in the execution of a run since its last start. Raises UserError if its identity changed.

    runs: what the newest checkpoint of each stage says of the run, and now: the same of this start, each with its
    `settings`, which are the whole recipe. defaults: the values of the keys of `trainer` that a recipe does not have.
    """
    if not runs:
        return []
    before = max(runs, key=lambda run: list(run["settings"]["stages"]).index(run["stage"]))
    differences = compare_recipes(before["settings"], now["settings"], before["stage"], defaults)
    deciding = [str(difference) for difference in differences if difference.decides]
    if deciding:
        more = f" and {len(deciding) - 4} more" if len(deciding) > 4 else ""
        raise UserError(
            f"{directory} contains a run of another recipe, or of this recipe with other settings:"
            f" {', '.join(deciding[:4])}{more}. {REMEDY}"
        )
    old, new = (
        flatten_settings({key: run[key] for key in ("versions", "devices") if key in before}) for run in (before, now)
    )
    facts = [Difference(key, old.get(key), new.get(key)) for key in {**old, **new}]
    return differences + [fact for fact in facts if fact.before != fact.now]


def compare_recipes(
    before: Mapping[str, Any], now: Mapping[str, Any], last: str, defaults: Mapping[str, Any]
) -> list[Difference]:
    """The settings in which two recipes differ.

    last: the last stage that was trained with `before`. The result depends on the stages up to this one.
    """
    begun = list(before["stages"])
    begun = begun[: begun.index(last) + 1]
    order = list(now["stages"])[: len(begun)]
    differences = [Difference("stages", begun, order, True)] if begun != order else []
    old, new = (flatten_settings(mask_settings(settings)) for settings in (before, now))  # records have no secrets
    judged = {name for recipe in (before, now) for name, stage in recipe["stages"].items() if _is_judged(stage)}
    for key in {**old, **new}:
        values = [settings.get(key, _get_default(key, defaults)) for settings in (old, new)]
        if _to_number(values[0]) != _to_number(values[1]) and not is_secret_name(key.rpartition(".")[2]):
            differences.append(Difference(key, *values, _is_decisive(key, begun, judged)))
    return differences


def _to_number(value: Any) -> Any:
    """A number in quotes as the number: `trainer` takes both."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def flatten_settings(value: Any, key: str = "") -> dict[str, Any]:
    """{dotted key: value} of a tree. A list of mappings, such as `data`, also has its number of entries."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        entries, leaves = enumerate(value), {f"{key} (entries)": len(value)}
    elif isinstance(value, dict) and value:
        entries, leaves = value.items(), {}
    else:
        return {key: value}
    for step, item in entries:
        leaves |= flatten_settings(item, f"{key}.{step}" if key else str(step))
    return leaves


def _get_default(key: str, defaults: Mapping[str, Any]) -> Any:
    _, _, section, field, *_ = [*key.split("."), "", "", ""]
    if section != "trainer":
        return None
    return defaults.get(field) if field else {}


def _is_judged(stage: Mapping[str, Any]) -> bool:
    """Whether validation losses decide which weights a stage ends with."""
    trainer = stage["trainer"]
    return bool(
        trainer.get("load_best_model_at_end")
        or trainer.get("save_strategy") == "best"
        or trainer.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
        or stage.get("early_stopping")
    )


def _is_decisive(key: str, begun: Sequence[str], judged: set[str]) -> bool:
    """Whether the result of a begun stage depends on a setting."""
    top, name, section, *rest = [*key.split("."), "", ""]
    if top != "stages":
        return top != "eval" and key != "model.llm.attn_implementation"
    if name not in begun or section == "on_bad_sample":
        return False
    if section in ("data", "validation"):  # their content is compared, wherever it lies: check_data
        return not {"path", "images", "urls"} & set(rest)
    return section != "trainer" or rest[0] not in EXECUTION or (rest[0] in JUDGED and name in judged)


def check_data_unchanged(stage: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError if the data of a stage is not that which the checkpoint to resume from was trained on.

    before: what the checkpoint says of the run; {} without one. now: the facts of the stage at this start. Only what
    both have is compared: earlier versions recorded less.
    """
    for kind in ("data", "validation"):
        for old, new in zip(before.get(kind, ()), now.get(kind, ()), strict=False):  # the recipes have equal numbers
            compared = (old.keys() & new.keys()) - {"path", "weight"}
            if "files" in compared:
                compared.remove("fingerprint")  # of a stream: the path is in it
            if all(old[key] == new[key] for key in compared):
                continue
            content = "files" if "files" in compared else "fingerprint"
            same = old[content] == new[content]
            why = (
                " Its content is the same, so the template, the tokenizer, images or the package changed."
                if same
                else ""
            )
            raise UserError(
                f"the {kind} {new['path']} of stage {stage} changed since step {before['step']}: it had"
                f" {_describe_source(old)}, and now has {_describe_source(new)}.{why} Restore it to resume. {REMEDY}"
            )


def check_moved_data(
    stage: str, specs: Sequence[Any], facts: Sequence[Mapping[str, Any]], open_source: Callable[[Any], Any]
) -> None:
    """Raise UserError if a finished stage names a new file with other content. Its data is not read otherwise."""
    for spec, entry in zip(specs, facts, strict=False):
        if spec.path != entry["path"] and open_source(spec).fingerprint != entry["fingerprint"]:
            raise UserError(f"stage {stage} is finished. It was trained on {entry['path']}, not {spec.path}. {REMEDY}")


def _describe_source(source: Mapping[str, Any]) -> str:
    """`12 records (12 usable, content 02a4b186, tokens 1f0c9a3e)`. The size of a stream is not known."""
    hashes = {"content": source.get("files", source["fingerprint"]), "tokens": source.get("tokenised")}
    shown = ", ".join(f"{name} {value[:8]}" for name, value in hashes.items() if value)
    return f"{source['records']:,} records ({source['usable']:,} usable, {shown})" if "records" in source else shown
