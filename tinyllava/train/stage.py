"""The story of a run: every stage builds, tunes, reads its data, trains and saves.

    tinyllava train quickstart            # run(), below
    tinyllava look quickstart             # prepare() without weights

A run is a directory. What is finished is not done again; what was interrupted goes on from its last whole checkpoint:

    runs/quickstart/  recipe.yaml  run.json  pretrain/  finetune/{metrics.jsonl, curve.png, checkpoint-500/, final/}

A stage that quantises weights keeps them as they were in start/, unless it begins with a checkpoint that holds them.
"""

import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback

from tinyllava.config import Recipe, Stage
from tinyllava.console import messages
from tinyllava.data.dataset import SupervisedDataset, build_dataset, split
from tinyllava.data.sample import Sample
from tinyllava.data.sources import read
from tinyllava.data.streaming import StreamingDataset
from tinyllava.data.template import Template
from tinyllava.errors import UserError
from tinyllava.model import checkpoint
from tinyllava.model.adapter import has_adapter, merge
from tinyllava.model.build import build
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.parts import DTYPES
from tinyllava.model.processor import TinyLlavaProcessor
from tinyllava.model.quantise import compute_in
from tinyllava.model.weight_files import part_files
from tinyllava.train.arguments import training_arguments
from tinyllava.train.record import RunRecord, is_main_process
from tinyllava.train.report import ProgressBar, RunLog, parts_table
from tinyllava.train.trainer import Trainer
from tinyllava.train.tune import Tuned, apply_tuning, select, unchanged
from tinyllava.tuning import Selection

logger = logging.getLogger("tinyllava")
FINAL = "final"
START = "start"
# Parameters below which a second CPU thread does not pay: it saved 7 % of the time for 0.9 M, and 35 % for 5 M
# (perf/README.md, Threads). The other core then reads data.
SMALL = 3_000_000


@dataclass
class Setup:
    """A stage that is ready to train."""

    stage: Stage
    model: TinyLlavaForConditionalGeneration
    processor: TinyLlavaProcessor
    template: Template  # the model's own: what a checkpoint is served with
    tuned: list[Tuned]
    dataset: SupervisedDataset | StreamingDataset
    validation: SupervisedDataset | None
    args: TrainingArguments
    reuse: dict[str, list[Path]]  # files that hold the weights of parts which this stage does not change


def run(recipe: Recipe, name: str, output: Path, overwrite: bool = False) -> Path:
    """Train all stages of `recipe` in the directory `output` and return the last stage's final checkpoint.

    Continues an interrupted run and skips finished stages. Raises UserError when `output` holds another recipe's run.
    """
    if overwrite and is_main_process():
        shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    record = RunRecord(output, recipe, name)
    if is_main_process():
        (output / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        record.write()
    start: Path | None = None
    for stage_name in recipe.stages:
        final = output / stage_name / FINAL
        if is_whole(final):
            logger.info("stage %s is finished already", stage_name)
        else:
            run_stage(recipe, stage_name, start, output / stage_name, record)
        start = final
    return final


def run_stage(recipe: Recipe, name: str, start: Path | None, output: Path, record: RunRecord) -> None:
    """One stage: prepare, train from the last whole checkpoint if there is one, save."""
    logger.info("stage %s: building from %s", name, start or "the recipe's parts")
    setup = prepare(recipe, name, start, output=output)
    if is_main_process():
        facts = {"data": setup.dataset.sources, "bad_samples": setup.dataset.report}
        record.stage(name, **facts, tuned=[vars(row) for row in setup.tuned])
        messages.print(parts_table(setup.tuned, setup.args.learning_rate))
    if setup.args.use_cpu and "OMP_NUM_THREADS" not in os.environ and setup.model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    trainer = make_trainer(setup, name, output, record)
    last = last_checkpoint(output)
    logger.info("stage %s: %s", name, f"continuing from {last.name}" if last else f"{len_or_stream(setup)} samples")
    trainer.train(resume_from_checkpoint=str(last) if last else None)

    logger.info("stage %s: saving", name)
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if is_main_process():
        with checkpoint.aside(output / FINAL) as directory:
            trainer.save_to(directory, state)
        record.stage(name, finished=True, steps=trainer.state.global_step, skipped_in_training=len(trainer.skipped))
    trainer.accelerator.wait_for_everyone()


def prepare(
    recipe: Recipe, name: str, start: Path | None = None, output: Path = Path("runs"), empty: bool = False
) -> Setup:
    """Everything a stage needs, short of training. `start` is the checkpoint before it; with `empty` no weights are
    read.

    An adapter that an earlier stage trained is merged: this stage decides anew what is trained.
    """
    stage = recipe.stages[name]
    unset_hf_deepspeed_config()  # of the stage before: under its zero3, models would be made in shards
    source = start or (Path(recipe.model.checkpoint) if recipe.model.checkpoint else None)
    reuse: dict[str, list[Path]] = {}
    if source is None:
        model, processor, template = build(recipe.model, lambda: training_samples(recipe), recipe.seed, empty)
    else:
        dtype, lacking = ("auto", {}) if start else (recipe.model.dtype, recipe.model.lacking.given())
        model, processor, template, _ = checkpoint.load(source, DTYPES[dtype], **lacking)
        if has_adapter(model):
            model = merge(model)
        elif dtype == "auto":
            reuse = part_files(source)
    selections = select(model, stage.tune)
    quantised = [part for part, selection in selections.items() if selection.quantised]
    if quantised and not empty and not all(reuse.get(part) for part in quantised):
        reuse = keep_start(model, processor, template, output / START)
    tuned = apply_tuning(model, stage.tune, recipe.seed, selections)
    args = training_arguments(stage, output, recipe.seed)
    refuse_sharding(selections, args)
    if quantised and (args.bf16 or args.fp16):
        compute_in(model, torch.bfloat16 if args.bf16 else torch.float16)
    if (args.bf16 or args.fp16) and not args.deepspeed:  # master weights in fp32, as DeepSpeed keeps them by itself
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    data = {
        "template": Template.load(stage.template, compat=template.compat) if stage.template else template,
        "tokenizer": processor.tokenizer,
        "tokens_per_image": processor.tokens_per_image,
        "tiles": processor.tiling,
        "pixels": processor.pixels,
        "max_length": stage.max_length or recipe.model.max_length,
        "on_bad_sample": stage.on_bad_sample,
        "seed": recipe.seed,
        "draft": 2 * model.config.image_size,
    }
    dataset = build_dataset(stage.data, **data)
    validation = None
    if isinstance(stage.validation, float):
        dataset, validation = split(dataset, stage.validation, seed=recipe.seed)
    elif stage.validation:
        validation = build_dataset(stage.validation, **data)
    reuse = {part: files for part, files in reuse.items() if part in unchanged(model)}
    return Setup(stage, model, processor, template, tuned, dataset, validation, args, reuse)


def keep_start(
    model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor, template: Template, directory: Path
) -> dict[str, list[Path]]:
    """Save what a stage starts from, and return its files: what checkpoints link once the weights are quantised."""
    if is_main_process() and not is_whole(directory):
        with checkpoint.aside(directory) as temporary:
            checkpoint.save(model, processor, template, temporary)
    return part_files(directory)


def refuse_sharding(selections: dict[str, Selection], args: TrainingArguments) -> None:
    """Raise UserError for what a tuning asks of a part whose weights would be sharded."""
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    for part, selection in selections.items():
        if selection.quantised and (zero3 or args.fsdp):
            sharding = "zero3" if zero3 else "FSDP"
            raise UserError(f"the {part} is quantised, and {sharding} cannot shard packed weights. Use zero2 or DDP.")
        if selection.rows and args.fsdp:  # whose gradients never pass the parameter itself
            raise UserError(f"FSDP cannot train single rows of the {part}. Use zero2, zero3 or DDP.")


def make_trainer(setup: Setup, name: str, output: Path, record: RunRecord, order: list[int] | None = None) -> Trainer:
    """The Trainer of a stage. `order` fixes the order of samples (see plan.py)."""
    kept = unchanged(setup.model)
    written = dict(setup.reuse)

    def save(directory: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        step = trainer.state.global_step
        facts = {**record.of_stage(name, step), "skipped_in_training": len(trainer.skipped)}
        files = checkpoint.save(setup.model, setup.processor, setup.template, directory, facts, state_dict, written)
        final = output / (FINAL if directory.name.startswith(f".{FINAL}") else f"checkpoint-{step}")
        written.update({part: [final / path.name for path in files[part]] for part in kept})

    trainer = Trainer(
        model=setup.model,
        args=setup.args,
        stage=setup.stage,
        dataset=setup.dataset,
        validation=setup.validation,
        save=save,
        pad_token_id=setup.processor.tokenizer.pad_token_id,
        callbacks=[RunLog(output), ProgressBar(name)],
        order=order,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_samples(recipe: Recipe) -> Iterator[Sample]:
    """Samples of all stages in turn, evenly: what a tokenizer is trained on."""
    streams = [read(spec).samples() for stage in recipe.stages.values() for spec in stage.data]
    for row in itertools.zip_longest(*streams):
        yield from (sample for sample in row if sample is not None)


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a stage."""
    numbered = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    return next((path for path in numbered if is_whole(path) and (path / "trainer_state.json").is_file()), None)


def is_whole(directory: Path) -> bool:
    """Whether a checkpoint directory exists and nothing of it is missing."""
    try:
        return directory.is_dir() and checkpoint.read_record(directory) is not None
    except UserError:
        return False


def len_or_stream(setup: Setup) -> str:
    """How many samples a stage has, in words."""
    return "streamed" if isinstance(setup.dataset, StreamingDataset) else f"{len(setup.dataset):,}"
