"""HF Trainer with planned batches, a learning rate for each part, whole checkpoints and helpful errors."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput

from tinyllava import atomic, checkpoint
from tinyllava.checkpoint.adapter import has_adapter
from tinyllava.checkpoint.record import add_training_state
from tinyllava.config import Stage
from tinyllava.console import is_main_process
from tinyllava.data.collate import Collator
from tinyllava.data.dataset import SupervisedDataset
from tinyllava.data.labels import IGNORE
from tinyllava.data.streaming import StreamingDataset
from tinyllava.errors import UserError
from tinyllava.model.vlm import VLM
from tinyllava.runs import has_stopped_early, make_room, rotate_checkpoints
from tinyllava.train.batching import PlannedBatches, PlannedDataset, PlannedLoader, StreamLoader, StreamShare
from tinyllava.train.checkpoints import CheckpointWriter
from tinyllava.train.plan import Plan
from tinyllava.train.tune import find_layer_classes, make_parameter_groups

# It warns about intervals and micro-batches that changed since the checkpoint. The run's record names these changes.
logging.getLogger("transformers.trainer_utils").addFilter(lambda line: "do not match the ones" not in line.getMessage())
logger = logging.getLogger("tinyllava")


class Trainer(transformers.Trainer):
    """HF Trainer over a plan.

    stage: its `tune` gives each part its learning rate. writer: writes whole checkpoints. order: fixes the order of
    samples.
    """

    def __init__(
        self,
        vlm: VLM,
        args: TrainingArguments,
        stage: Stage,
        dataset: SupervisedDataset | StreamingDataset,
        validation: SupervisedDataset | None,
        writer: CheckpointWriter,
        callbacks: list[transformers.TrainerCallback],
        order: list[int] | None = None,
    ) -> None:
        self.stage, self.dataset, self.writer, self.order = stage, dataset, writer, order
        self.waited = 0.0  # seconds spent waiting for data since the last log
        self.skipped: set[int] = set()  # samples whose images could not be read
        self.stream: StreamLoader | None = None
        self.logged_at: float | None = None
        self.partial: Path | None = None  # where a checkpoint is being written
        self.final_step: int | None = None  # of the best weights, once they are loaded
        # FSDP gathers one layer at a time. CLIP's and SigLIP's own lists also name classes of their text models.
        if args.fsdp:
            vlm.model._no_split_modules = find_layer_classes(vlm.model)
        super().__init__(
            model=vlm.model,
            args=args,
            train_dataset=dataset,
            eval_dataset=validation,
            data_collator=Collator(vlm.tokenizer.pad_token_id),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # it would print every log
        self.label_smoother = None  # the model smooths, where it computes the loss; HF's would not shift the labels

    # -- batches -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The planned micro-batches of this rank. accelerate must not prepare them: it would shard them again."""
        args, workers = self.args, self.args.dataloader_num_workers
        shape = (self.stage.global_batch_size, args.per_device_train_batch_size, args.world_size)
        kwargs = {"persistent_workers": workers > 0, "prefetch_factor": args.dataloader_prefetch_factor}
        kwargs |= {"num_workers": workers, "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available()}
        kwargs |= {"multiprocessing_context": args.dataloader_multiprocessing_context if workers else None}
        if isinstance(self.dataset, StreamingDataset):
            size, micro, world = shape
            share = StreamShare(self.dataset, size, world, args.process_index)
            self.stream = StreamLoader(share, micro, self.data_collator, **kwargs)
            return self.stream
        plan = Plan(self.dataset.lengths, *shape, seed=args.data_seed, order=self.order)
        batches = PlannedBatches(plan, args.process_index)
        dataset = PlannedDataset(self.dataset)
        return PlannedLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator, **kwargs)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Samples in an epoch, for HF's log."""
        return len(self.dataset)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one step, and its number of supervised tokens.

        Raises UserError when nothing is supervised.
        """
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.waited += time.perf_counter() - start
        if batches and num_items is not None and int(num_items) == 0:
            ids = self._list_ids(torch.cat([batch["index"] for batch in batches]))
            raise UserError(
                f"step {self.state.global_step + 1} has no supervised token (samples {ids}). Check the template."
            )
        return batches, num_items

    # -- steps ---------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. Raises UserError with the step and the samples when the loss is not a number."""
        index, skipped = inputs.pop("index"), inputs.pop("skipped", None)
        if skipped is not None:
            self.skipped |= set(index[skipped].tolist())
        inputs["label_smoothing"] = self.args.label_smoothing_factor  # only here: validation shows the plain loss
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            is_half = any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad)
            remedy = ", or train in bf16 instead of fp16" if self.args.fp16 else ""
            remedy = ", or remove `model.dtype: float16`" if is_half and not remedy else remedy
            raise UserError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()} (samples {self._list_ids(index)})."
                f" Lower the learning rate{remedy}. Earlier checkpoints are intact."
            )
        return loss

    def _list_ids(self, index: Tensor, most: int = 8) -> str:
        """The ids of the first `most` samples."""
        names = [self.dataset.ids[sample] for sample in index.tolist()]
        return ", ".join(names[:most]) + (" ..." if len(names) > most else "")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """HF's choice of optimiser, over a parameter group for each part."""
        if self.optimizer is None:
            model = model or self.model
            decayed = set(self.get_decay_parameter_names(model))
            lr, decay = self.args.learning_rate, self.args.weight_decay
            groups = make_parameter_groups(model, self.stage.tune, lr, decay, decayed)
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """HF's log, with each part's learning rate and the share of time spent waiting for data."""
        if "loss" in logs:
            now = time.perf_counter()
            if self.logged_at is not None and now > self.logged_at:
                logs["data_wait"] = round(self.waited / (now - self.logged_at), 4)
            self.logged_at, self.waited = now, 0.0
            # All groups follow one schedule, so the ratio of their rates does not change.
            groups = self.optimizer.param_groups
            first = groups[0].get("initial_lr", groups[0]["lr"])
            for group in groups:
                ratio = group.get("initial_lr", group["lr"]) / first if first else 1.0
                logs[f"lr/{group['part']}"] = logs["learning_rate"] * ratio
        if self.stream is not None:  # HF counts the steps of a stream from its resume on
            self.state.epoch = self.state.global_step / self.state.max_steps
        super().log(logs, start_time)

    # -- resuming ------------------------------------------------------------------------------------------------------

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        start = super()._init_training_state(max_steps, *args)
        *_, resumed, _ = args
        if resumed and self.stream is not None:
            self.stream.load(Path(resumed), self.state.global_step)
            start = (0, 0)  # nothing is to be skipped
        # HF takes the intervals of logs, saves and evaluations from the checkpoint. They may change at a resume.
        self.state.compute_steps(self.args, max_steps)
        # A run that was killed after its last step, but before `final`: HF would train one step more.
        is_over = self.state.global_step >= max_steps or has_stopped_early(self.state)
        return (sys.maxsize, 0) if is_over else start

    # -- validation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per supervised token of the validation data.

        It does not depend on the batch size or the number of devices.
        """
        args, model = self.args, self.model
        micro, world = args.per_device_eval_batch_size, args.world_size
        batches = PlannedBatches(Plan(self.eval_dataset.lengths, micro * world, micro, world), args.process_index)
        dataset = PlannedDataset(self.eval_dataset)
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=args.device)  # summed loss, supervised tokens
        for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator):
            batch.pop("index"), batch.pop("skipped", None)
            batch = self._prepare_inputs(batch)
            tokens = (batch["labels"][:, 1:] != IGNORE).sum()
            with self.compute_loss_context_manager():
                loss = model(**batch, num_items_in_batch=1).loss
            total += torch.stack([loss.double(), tokens.double()]).to(total)
        model.train()
        if world > 1:
            dist.all_reduce(total)
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1].clamp(min=1)).item()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- the best weights ----------------------------------------------------------------------------------------------

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the loss is the lowest so far. Its weights are saved at once, whatever save_steps is."""
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best

    def _finalize_training(self, *args: Any) -> TrainOutput:
        """Load the best weights, if asked. HF would load other files, and delete all other checkpoints."""
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = None
        if self.args.load_best_model_at_end and not best.is_dir():
            logger.warning("no checkpoint with the best weights is there: the last weights are saved.")
        elif self.args.load_best_model_at_end:
            logger.info("the best weights are those of %s: loss %.4f", best.name, self.state.best_metric)
            if self.is_deepspeed_enabled:
                strict = not has_adapter(self.model)
                deepspeed_load_checkpoint(self.model_wrapped, str(best), load_module_strict=strict)
            else:
                checkpoint.restore(self.model, best)
            self.final_step = self.state.best_global_step
        return super()._finalize_training(*args)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.partial or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save HF's checkpoint beside its place and rename it: a kill or a full disk damages no earlier checkpoint."""
        final = self._get_checkpoint_path()
        self.partial = atomic.partial_path(final)
        with atomic.write_directory(final) if self.args.should_save else nullcontext():
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:  # HF has written into its own checkpoint-N inside the directory: move it up
                inner = self.partial / final.name
                for path in list(inner.iterdir()):
                    path.rename(self.partial / path.name)
                inner.rmdir()
                # HF has recorded the best checkpoint by its path in the partial directory.
                best_step = self.state.best_global_step
                self.state.best_model_checkpoint = best_step and str(final.with_name(f"checkpoint-{best_step}"))
                self.state.save_to_json(str(self.partial / TRAINER_STATE_NAME))
                add_training_state(self.partial)
                make_room(final)
        self.partial = None
        if self.args.should_save:
            rotate_checkpoints(final, self.args.save_total_limit, f"checkpoint-{self.state.best_global_step}")
        self.accelerator.wait_for_everyone()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.stream is not None:
            self.stream.save(Path(output_dir), self.args.process_index)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:  # HF calls this on all ranks, because all had to gather sharded weights
            self.write_checkpoint(Path(output_dir), self._get_checkpoint_path(), state_dict)

    def _get_checkpoint_path(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def save_final(self, directory: Path) -> None:
        """Write the last checkpoint of the stage. All ranks must call it: each has a share of sharded weights."""
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        state = self.accelerator.get_state_dict(self.model_wrapped) if is_sharded else None
        if is_main_process():
            make_room(directory)
            with atomic.write_directory(directory) as partial:
                self.write_checkpoint(partial, directory, state)
        self.accelerator.wait_for_everyone()

    def write_checkpoint(self, directory: Path, name: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint into `directory`, which will be renamed to `name`."""
        step = self.final_step or self.state.global_step
        self.writer.write(directory, name, step, len(self.skipped), state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.restore(self.model, Path(resume_from_checkpoint))
