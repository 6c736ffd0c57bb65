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
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput

from tinyllava import atomic, checkpoint
from tinyllava.checkpoint.adapter import has_adapter
from tinyllava.config import Stage
from tinyllava.console import is_main_process
from tinyllava.data.collate import Collator
from tinyllava.data.dataset import SupervisedDataset
from tinyllava.data.labels import IGNORE
from tinyllava.data.streaming import StreamingDataset
from tinyllava.guards.gradients import PartGuard
from tinyllava.guards.losses import LossGuard
from tinyllava.interrupt import shield_worker
from tinyllava.model.vlm import VLM
from tinyllava.record import add_training_state
from tinyllava.runs import has_stopped_early, make_room, rotate_checkpoints
from tinyllava.train.batching import PlannedBatches, PlannedDataset, PlannedLoader, StreamLoader
from tinyllava.train.checkpoints import CheckpointWriter
from tinyllava.train.plan import Plan
from tinyllava.train.tune import compute_learning_rates, find_layer_classes, make_parameter_groups

# It warns about intervals and micro-batches that changed since the checkpoint. The run's record names these changes.
logging.getLogger("transformers.trainer_utils").addFilter(lambda line: "do not match the ones" not in line.getMessage())
logger = logging.getLogger("tinyllava")


class Trainer(transformers.Trainer):
    """HF Trainer over a plan.

    stage: its `tune` gives each part its learning rate. writer: writes whole checkpoints. callbacks: first the RunLog.
    order: fixes the order of samples.
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
        self.is_idle = False  # whether the current step is skipped, because no image of it could be read
        self.longest_first = True  # but a run that an earlier version began keeps its order
        self.losses, self.part_guard = LossGuard(dataset, vlm.model, callbacks[0].add_line, args.fp16), PartGuard()
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
            callbacks=[*callbacks, self.part_guard],
        )
        self.remove_callback(PrinterCallback)  # it would print every log
        self.label_smoother = None  # the model smooths, where it computes the loss; HF's would not shift the labels

    # -- batches -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The planned micro-batches of this rank. accelerate must not prepare them: it would shard them again."""
        args, workers = self.args, self.args.dataloader_num_workers
        shape = (self.stage.global_batch_size, args.per_device_train_batch_size, args.world_size)
        kwargs = {"persistent_workers": workers > 0, "num_workers": workers, "worker_init_fn": shield_worker}
        pins = args.dataloader_pin_memory and args.device.type not in ("cpu", "mps")
        kwargs |= {"prefetch_factor": args.dataloader_prefetch_factor, "pin_memory": pins}
        kwargs |= {"multiprocessing_context": args.dataloader_multiprocessing_context if workers else None}
        if isinstance(self.dataset, StreamingDataset):
            self.stream = StreamLoader(self.dataset, *shape, args.process_index, self.data_collator, **kwargs)
            return self.stream
        seed, lengths = args.data_seed, self.dataset.lengths
        plan = Plan(lengths, *shape, seed=seed, order=self.order, longest_first=self.longest_first)
        kwargs |= {"batch_sampler": PlannedBatches(plan, args.process_index), "collate_fn": self.data_collator}
        return PlannedLoader(PlannedDataset(self.dataset), **kwargs)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Samples in an epoch, for HF's log."""
        return len(self.dataset)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one step, and its number of supervised tokens. Raises UserError if it has none."""
        if self.args.device.type == "cpu" or self.losses.is_full:
            self.losses.check(self.state)
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.waited += time.perf_counter() - start
        # On a GPU, reading the sum over all ranks would wait for the device: only a rank without tokens reads it.
        tokens = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
        self.is_idle = bool(batches) and not tokens and int(num_items) == 0
        if self.is_idle:
            self.losses.skip(self.state.global_step + 1, batches)
        return batches, num_items

    # -- steps ---------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. In a step that is skipped it computes nothing, and the optimiser does nothing."""
        index, skipped = inputs.pop("index"), inputs.pop("skipped", None)
        if skipped is not None:
            self.skipped |= set(index[skipped].tolist())
        if self.is_idle:
            self.accelerator.gradient_state._set_sync_gradients(False)
            return torch.zeros((), device=self.args.device)
        self.part_guard.has_images |= "pixel_values" in inputs
        inputs["label_smoothing"] = self.args.label_smoothing_factor  # only here: validation shows the plain loss
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.add(self.state.global_step + 1, loss, index.tolist())
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The loss. Raises UserError if it does not depend on anything that is trained."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not loss.requires_grad:
            self.part_guard.check_reached(self.state.global_step + 1)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return torch.zeros(()) if self.is_idle else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, torch.zeros(()) if self.is_idle else grad_norm)

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
            self.losses.check(self.state)
            self.losses.correct_mean(logs, self.state.global_step)
            now = time.perf_counter()
            if self.logged_at is not None and now > self.logged_at:
                logs["data_wait"] = round(self.waited / (now - self.logged_at), 4)
            self.logged_at, self.waited = now, 0.0
            logs |= compute_learning_rates(self.optimizer.param_groups, logs["learning_rate"])
        if self.stream is not None:  # HF counts the steps of a stream from its resume on
            self.state.epoch = self.state.global_step / self.state.max_steps
        super().log(logs, start_time)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        start = super()._init_training_state(max_steps, *args)
        *_, resumed, _ = args
        if resumed and self.stream is not None:
            self.stream.load(Path(resumed), self.state.global_step)
            start = (0, 0)  # nothing is to be skipped
        # HF takes the intervals of logs, saves and evaluations from the checkpoint. They may change at a resume.
        self.state.compute_steps(self.args, max_steps)
        self.losses.logged = self.state.global_step
        # A run that was killed after its last step, but before `final`: HF would train one step more.
        is_over = self.state.global_step >= max_steps or has_stopped_early(self.state)
        return (sys.maxsize, 0) if is_over else start

    # -- validation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per supervised token of the validation data, whatever the batch size and the devices."""
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

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the loss is the lowest so far. Its weights are saved at once, whatever save_steps is."""
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best or self.control.should_save  # with `save_strategy: best`, a signal can ask for a save too

    def _finalize_training(self, *args: Any) -> TrainOutput:
        """Load the best weights, if asked. HF would load other files, and delete all other checkpoints."""
        self.losses.finish(self.state)
        self.skipped = set(gather_object([*self.skipped]))
        self.part_guard.finish()
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = None
        if self.args.load_best_model_at_end and not best.is_dir():
            logger.warning("no checkpoint with the best weights is there: the last weights are saved.")
        elif self.args.load_best_model_at_end:
            logger.info("the best weights are those of %s: loss %.4f", best.name, self.state.best_metric)
            if self.is_deepspeed_enabled:
                deepspeed_load_checkpoint(self.model_wrapped, str(best), not has_adapter(self.model))
            else:
                checkpoint.restore(self.model, best)
            self.final_step = self.state.best_global_step
        return super()._finalize_training(*args)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.partial or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save HF's checkpoint beside its place and rename it: a kill or a full disk damages no earlier checkpoint."""
        self.losses.check(self.state), self.part_guard.check_finite()
        self.skipped = set(gather_object([*self.skipped]))
        final = self._get_checkpoint_path()
        self.partial = atomic.partial_path(final)
        with atomic.write_directory(final) if self.args.should_save else nullcontext():
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:  # HF has written into its own checkpoint-N inside the directory: move it up
                atomic.move_up(self.partial / final.name)
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

    def _get_checkpoint_path(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.restore(self.model, Path(resume_from_checkpoint))
