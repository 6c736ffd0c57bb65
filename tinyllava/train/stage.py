"""Run the stages of a recipe: each tunes a vision tower, a connector and an LLM, on its own data.

A stage is: start from a model, select what is trained of its three parts, read the data, train, save.

    tinyllava train quickstart            # run(), below
    tinyllava look quickstart             # prepare_stage(), without weights

A run is a directory. A finished stage is not run again. An interrupted stage resumes from its last whole checkpoint:

    runs/quickstart/  recipe.yaml  run.json  pretrain/  finetune/{metrics.jsonl, curve.png, checkpoint-500/, final/}

A stage that quantises weights saves the unquantised ones in start/, unless it starts from a checkpoint that has them.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from tinyllava.checkpoint import is_whole
from tinyllava.config import Recipe, Stage
from tinyllava.console import is_main_process
from tinyllava.data.dataset import SupervisedDataset, build_dataset, hold_out
from tinyllava.data.options import DataOptions
from tinyllava.data.sources import open_source
from tinyllava.data.streaming import StreamingDataset
from tinyllava.data.template import Template
from tinyllava.errors import UserError
from tinyllava.guards.gradients import require_images
from tinyllava.guards.shortage import explain_out_of_memory
from tinyllava.identity import check_data_unchanged, check_moved_data
from tinyllava.interrupt import catch_signals
from tinyllava.locks import lock_run
from tinyllava.model.vlm import VLM
from tinyllava.resume import UNIVERSAL, find_last_checkpoint
from tinyllava.runs import FINAL, START, check_is_run, read_run, set_run_aside
from tinyllava.trackers import make_run_id, track_as
from tinyllava.train.arguments import make_arguments
from tinyllava.train.callbacks import RunLog, Stopper
from tinyllava.train.checkpoints import CheckpointWriter
from tinyllava.train.precision import set_precision
from tinyllava.train.record import RunRecord
from tinyllava.train.sharding import check_sharding
from tinyllava.train.start import WeightFiles, keep_unquantised, start_stage
from tinyllava.train.trainer import Trainer
from tinyllava.train.tune import TunedPart, apply_tuning, describe_parts, select_tuning

logger = logging.getLogger("tinyllava")
# Models with fewer parameters train with one CPU thread, and the other core reads data. A second thread saved 7 % of
# the time for 0.9 M parameters, and 35 % for 5 M (perf/README.md, Threads).
ONE_THREAD = 3_000_000


@dataclass
class StageSetup:
    """A stage that is ready to train."""

    stage: Stage
    vlm: VLM
    parts: list[TunedPart]  # what is trained of vision tower, connector and LLM
    dataset: SupervisedDataset | StreamingDataset
    validation: SupervisedDataset | None
    args: TrainingArguments
    start_files: WeightFiles


# Called with a stage's name, setup and directory before it trains: shows them, and returns what follows the training.
Follow = Callable[[str, StageSetup, Path], Sequence[TrainerCallback]]


def run(recipe: Recipe, name: str, output: Path, overwrite: bool = False, follow: Follow | None = None) -> Path:
    """Train all stages of `recipe` in the directory `output` and return the last stage's final checkpoint.

    Resumes an interrupted run and skips finished stages. Raises UserError when `output` holds another recipe's run, or
    another process trains in it, and Interrupted when a signal (SIGTERM, SIGUSR1, SIGHUP, Ctrl-C) stopped the run.
    """
    with catch_signals(), lock_run(output):
        if overwrite:
            start_over(recipe, output)
        record = RunRecord(output, recipe, name)
        finished = {stage for stage in recipe.stages if is_whole(output / stage / FINAL)}
        check_stages(recipe, [stage for stage in recipe.stages if stage not in finished])
        previous: Path | None = None
        for stage, settings in recipe.stages.items():
            final = output / stage / FINAL
            if stage in finished:
                check_moved_data(stage, settings.data, record.content["stages"][stage].get("data", ()), open_source)
                logger.info("stage %s: already finished", stage)
            else:
                run_stage(recipe, stage, previous, output / stage, record, follow)
            previous = final
        record.add_changes(stage, {"step": record.content["stages"][stage].get("steps")})
        record.write()
        return final


def check_stages(recipe: Recipe, names: Iterable[str], trains: bool = True) -> None:
    """Make the arguments of these stages, so that a wrong value of a late one stops the run before the first trains.

    trains: whether they will train in this process. Raises UserError for a value that cannot be used.
    """
    precision = getattr(torch.backends, "fp32_precision", None)
    for name in names:
        args = make_arguments(recipe, name, Path("runs"))
        if precision:  # `tf32: true` has set it for the process, and is for its own stage
            torch.backends.fp32_precision = precision
        if trains and args.fsdp and args.world_size == 1:
            raise UserError(f"stages.{name}.trainer.fsdp requires several processes. Start the command with torchrun.")


def start_over(recipe: Recipe, output: Path) -> None:
    """Set the run in `output` aside, after the recipe and the data of the new one were read without an error."""
    check_is_run(output)
    logger.info("checking the new run, before it replaces the old one in %s", output)
    for name in recipe.stages:
        prepare_stage(recipe, name, empty=True)
    PartialState().wait_for_everyone()  # no process reads the old run while the main process moves it
    if is_main_process():
        set_run_aside(output)
    PartialState().wait_for_everyone()


def run_stage(
    recipe: Recipe, name: str, previous: Path | None, output: Path, record: RunRecord, follow: Follow | None = None
) -> None:
    """Run one stage in the directory `output`, from the checkpoint of the stage before: prepare, train, save."""
    setup = prepare_stage(recipe, name, previous, output)
    trainer = make_trainer(setup, name, output, record)
    engine = "deepspeed" if trainer.is_deepspeed_enabled else "fsdp" if trainer.is_fsdp_enabled else "plain"
    last = find_last_checkpoint(output, engine, setup.args.world_size)
    if last and (last / UNIVERSAL).is_file():
        trainer.accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
    before = read_run(last) if last else {}
    listed = setup.validation.sources if isinstance(setup.stage.validation, list) else []  # else it is a share of data
    facts = {"data": setup.dataset.sources, "validation": listed, "bad_samples": setup.dataset.bad_records.to_dict()}
    check_data_unchanged(name, before, facts)
    record.add_changes(name, before)
    run_id = before.get("run_id") or make_run_id(name)
    trainer.longest_first = facts["longest_first"] = before.get("longest_first", last is None)
    record.update_stage(name, **facts, tuned=[vars(part) for part in setup.parts], run_id=run_id)
    for callback in follow(name, setup, output) if follow else ():
        trainer.add_callback(callback)

    samples = "streamed data" if isinstance(setup.dataset, StreamingDataset) else f"{len(setup.dataset):,} samples"
    logger.info("stage %s: %s", name, f"resuming from {last.name}" if last else f"training on {samples}")
    with catch_signals() as stop, stop.defer(), track_as(run_id, trainer, before.get("step", 0)):
        trainer.add_callback(Stopper(stop, trainer.callback_handler))
        with explain_out_of_memory(name, setup.vlm.model, setup.dataset, setup.args):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
            logger.info("stage %s: saving %s", name, output / FINAL)
            trainer.save_final(output / FINAL)
        counts = {"skipped_in_training": len(trainer.skipped), "skipped_steps": len(trainer.losses.skipped_steps)}
        record.update_stage(name, finished=True, steps=trainer.state.global_step, **counts)


def prepare_stage(
    recipe: Recipe, name: str, previous: Path | None = None, output: Path = Path("runs"), empty: bool = False
) -> StageSetup:
    """Prepare everything that a stage needs before its first step. With `empty`, no weights are made or read."""
    stage = recipe.stages[name]

    logger.info("stage %s: starting from %s", name, previous or recipe.model.describe())
    vlm, files = start_stage(recipe, previous, empty)

    selections = select_tuning(vlm.model, stage.tune)
    if not empty:
        files = keep_unquantised(vlm, selections, files, output / START)
    parts = apply_tuning(vlm.model, stage.tune, recipe.seed, selections)
    logger.info("stage %s: %s", name, ", ".join(f"{part.title} {part.tuning}" for part in parts))

    args = make_arguments(recipe, name, output)
    if args.save_only_model:
        logger.info("stage %s: it cannot be resumed, because `save_only_model: true` saves no optimiser state", name)
    check_sharding(selections, args)
    set_precision(vlm.model, args, is_half_chosen=recipe.model.dtype in ("bfloat16", "float16"))
    parts = describe_parts(vlm.model, stage.tune)

    logger.info("stage %s: reading %s", name, ", ".join(spec.path for spec in stage.data))
    dataset, validation = read_data(recipe, stage, vlm)
    require_images(name, dataset, [part.part for part in parts if part.trainable])
    return StageSetup(stage, vlm, parts, dataset, validation, args, files)


def read_data(
    recipe: Recipe, stage: Stage, vlm: VLM
) -> tuple[SupervisedDataset | StreamingDataset, SupervisedDataset | None]:
    """Read the training and validation data of a stage. Raises UserError if the validation data would stream."""
    options = make_data_options(recipe, stage, vlm)
    dataset = build_dataset(stage.data, options)
    is_share = isinstance(stage.validation, float)
    validation = build_dataset(stage.validation, options) if stage.validation and not is_share else None
    if isinstance(dataset if is_share else validation, StreamingDataset):  # a format of the user's own streams
        raise UserError("validation data cannot stream. List data of another format under `validation:`.")
    return hold_out(dataset, stage.validation, seed=recipe.seed) if is_share else (dataset, validation)


def make_data_options(recipe: Recipe, stage: Stage, vlm: VLM) -> DataOptions:
    """How the stage's records become training items, with its own template if it names one."""
    template = Template.load(stage.template, compat=vlm.template.compat) if stage.template else vlm.template
    return DataOptions(
        template=template,
        tokenizer=vlm.tokenizer,
        tokens_per_image=vlm.processor.tokens_per_image,
        tiles=vlm.processor.tiling,
        pixels=vlm.processor.to_pixels,
        max_length=stage.max_length or recipe.model.max_length,
        supervised_turns=stage.supervised_turns,
        on_bad_sample=stage.on_bad_sample,
        seed=recipe.seed,
        draft=2 * vlm.model.config.image_size,
    )


def make_trainer(
    setup: StageSetup, name: str, output: Path, record: RunRecord, order: list[int] | None = None
) -> Trainer:
    """The Trainer of a stage. `order` fixes the order of samples (see plan.py)."""
    if isinstance(setup.dataset, StreamingDataset) and setup.args.max_steps <= 0:  # a format that streams by itself
        raise UserError("streaming data requires `max_steps`: its length is not known.")
    if setup.args.use_cpu and "OMP_NUM_THREADS" not in os.environ and setup.vlm.model.num_parameters() < ONE_THREAD:
        torch.set_num_threads(1)
    stops = setup.stage.early_stopping
    stopping = [EarlyStoppingCallback(stops.patience, stops.threshold)] if stops else []
    return Trainer(
        vlm=setup.vlm,
        args=setup.args,
        stage=setup.stage,
        dataset=setup.dataset,
        validation=setup.validation,
        writer=CheckpointWriter(setup.vlm, name, record, setup.start_files),
        callbacks=[RunLog(output), *stopping],
        order=order,
    )
