"""The story of a run: every stage builds, tunes, reads its data, trains and saves.

    tinyllava train quickstart            # run(), below
    tinyllava look quickstart             # prepare() without weights

A run is a directory. What is finished is not done again; what was interrupted goes on from its last whole checkpoint:

    runs/quickstart/  recipe.yaml  run.json  pretrain/  finetune/{metrics.jsonl, curve.png, checkpoint-500/, final/}
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
from tinyllava.model.processor import TinyLlavaProcessor
from tinyllava.train.arguments import training_arguments
from tinyllava.train.record import RunRecord, is_main_process
from tinyllava.train.report import ProgressBar, RunLog, parts_table
from tinyllava.train.trainer import Trainer
from tinyllava.train.tune import Tuned, apply_tuning

logger = logging.getLogger("tinyllava")
FINAL = "final"
# Parameters below which a second CPU thread does not pay: it saved 7 % of the time for 0.9 M (perf/README.md, Threads).
# The other core then reads data.
SMALL = 20_000_000


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
    source = start or (Path(recipe.model.checkpoint) if recipe.model.checkpoint else None)
    reuse: dict[str, list[Path]] = {}
    if source is None:
        model, processor, template = build(recipe.model, lambda: training_samples(recipe), recipe.seed, empty)
    else:
        model, processor, template, _ = checkpoint.load(source)
        if has_adapter(model):
            model = merge(model)
        else:
            reuse = checkpoint.part_files(source)
    tuned = apply_tuning(model, stage.tune, recipe.seed)
    args = training_arguments(stage, output, recipe.seed)
    if (args.bf16 or args.fp16) and not args.deepspeed:  # master weights in fp32, as DeepSpeed keeps them by itself
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    frozen = [row.part for row in tuned if not row.trainable]
    data = {
        "template": Template.load(stage.template, compat=template.compat) if stage.template else template,
        "tokenizer": processor.tokenizer,
        "tokens_per_image": processor.tokens_per_image,
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
    reuse = {part: files for part, files in reuse.items() if part in frozen}
    return Setup(stage, model, processor, template, tuned, dataset, validation, args, reuse)


def make_trainer(setup: Setup, name: str, output: Path, record: RunRecord, order: list[int] | None = None) -> Trainer:
    """The Trainer of a stage. `order` fixes the order of samples (see plan.py)."""
    frozen = [row.part for row in setup.tuned if not row.trainable]
    written = dict(setup.reuse)

    def save(directory: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        step = trainer.state.global_step
        facts = {**record.of_stage(name, step), "skipped_in_training": len(trainer.skipped)}
        files = checkpoint.save(setup.model, setup.processor, setup.template, directory, facts, state_dict, written)
        final = output / (FINAL if directory.name.startswith(f".{FINAL}") else f"checkpoint-{step}")
        written.update({part: [final / path.name for path in files[part]] for part in frozen})

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
