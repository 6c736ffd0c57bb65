"""HF Trainer, plus what it lacks: the planner's batches, a learning rate per part, whole checkpoints, useful errors."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from tinyllava.config import Stage
from tinyllava.data.collate import Collator
from tinyllava.data.dataset import SupervisedDataset
from tinyllava.data.streaming import StreamingDataset
from tinyllava.errors import UserError
from tinyllava.model import checkpoint
from tinyllava.model.modeling import IGNORE
from tinyllava.train.plan import Plan, PlannedBatches
from tinyllava.train.tune import layer_classes, parameter_groups


class PlannedLoader(DataLoader):
    """A DataLoader that tells its plan which epoch it is."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.batch_sampler.set_epoch(epoch)


class Planned(torch.utils.data.Dataset):
    """A dataset that understands the plan's fillers: ~index is sample index with nothing supervised."""

    def __init__(self, dataset: SupervisedDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= 0:
            return self.dataset[index]
        item = self.dataset[~index]
        return {**item, "labels": torch.full_like(item["labels"], IGNORE)}


class PlannedStream(IterableDataset):
    """A stream planned in windows of one optimiser step. Every rank reads it and takes its own micro-batches."""

    def __init__(
        self, dataset: StreamingDataset, global_batch_size: int, micro: int, world: int, rank: int, collate: Callable
    ):
        self.dataset, self.size, self.micro, self.world, self.rank = dataset, global_batch_size, micro, world, rank
        self.collate = collate

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        window: list[dict[str, Any]] = []
        for item in self.dataset:
            window.append(item)
            if len(window) == self.size:  # an incomplete last window is left out: its ranks would not have equal shares
                lengths = [len(sample["input_ids"]) for sample in window]
                plan = Plan(lengths, self.size, self.micro, self.world, order=range(self.size))
                for batch in plan.epoch(0, self.rank):
                    yield self.collate([window[index] for index in batch])
                window = []


class Trainer(transformers.Trainer):
    """HF Trainer over a plan.

    `save(directory, state_dict)` writes a whole checkpoint; `tune` gives each part its learning rate; `order` fixes
    the samples' order.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        stage: Stage,
        dataset: SupervisedDataset | StreamingDataset,
        validation: SupervisedDataset | None,
        save: Callable[[Path, dict[str, Tensor] | None], None],
        pad_token_id: int,
        callbacks: list[transformers.TrainerCallback],
        order: list[int] | None = None,
    ):
        self.stage, self.dataset, self.save_to, self.order = stage, dataset, save, order
        self.waited, self.skipped = 0.0, set()
        self._aside: Path | None = None
        if args.fsdp:  # gathers a layer at a time, and towers name classes that stand in their text halves alone
            model._no_split_modules = layer_classes(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=validation,
            data_collator=Collator(pad_token_id),
            callbacks=callbacks,
        )

    # -- batches -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The planner's micro-batches of this rank. Not prepared by accelerate, which would shard them once more."""
        args, workers = self.args, self.args.dataloader_num_workers
        shape = (self.stage.global_batch_size, args.per_device_train_batch_size, args.world_size)
        kwargs = {"num_workers": workers, "pin_memory": torch.cuda.is_available(), "persistent_workers": workers > 0}
        if isinstance(self.dataset, StreamingDataset):
            if args.max_steps <= 0:
                raise UserError("streamed data has no end that is known: set trainer.max_steps.")
            stream = PlannedStream(self.dataset, *shape, args.process_index, self.data_collator)
            return DataLoader(stream, batch_size=None, **{**kwargs, "num_workers": min(1, workers)})
        self.plan = Plan(self.dataset.lengths, *shape, seed=args.data_seed, order=self.order)
        batches = PlannedBatches(self.plan, args.process_index)
        return PlannedLoader(Planned(self.dataset), batch_sampler=batches, collate_fn=self.data_collator, **kwargs)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Samples in an epoch, for the Trainer's log."""
        return len(self.dataset)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one step, with the time spent waiting for them.

        Raises UserError when nothing is supervised.
        """
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.waited += time.perf_counter() - start
        if batches and num_items is not None and int(num_items) == 0:
            ids = self._ids(torch.cat([batch["index"] for batch in batches]))
            raise UserError(
                f"step {self.state.global_step + 1} has no supervised token at all (samples {ids}). Check the template."
            )
        return batches, num_items

    # -- steps ---------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch. Raises UserError with the step and the samples when the loss is not a number."""
        index, skipped = inputs.pop("index"), inputs.pop("skipped", None)
        if skipped is not None:
            self.skipped |= set(index[skipped].tolist())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()} (samples {self._ids(index)})."
                " Lower the learning rate, or train in bf16 instead of fp16; earlier checkpoints are good."
            )
        return loss

    def _ids(self, index: Tensor) -> str:
        ids = getattr(self.dataset, "ids", None)
        names = [str(ids[i]) if ids is not None else str(i) for i in index.tolist()]
        return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser over the parts' groups."""
        if self.optimizer is None:
            model = model or self.model
            decayed = set(self.get_decay_parameter_names(model))
            lr, decay = self.args.learning_rate, self.args.weight_decay
            groups = parameter_groups(model, self.stage.tune, lr, decay, decayed)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each part's learning rate and the share of time spent waiting for data."""
        if "loss" in logs:
            now = time.perf_counter()
            elapsed = now - getattr(self, "_logged_at", now)
            if elapsed > 0:
                logs["data_wait"] = round(self.waited / elapsed, 4)
            self._logged_at, self.waited = now, 0.0
            groups = self.optimizer.param_groups  # all follow one schedule, so their ratio never changes
            first = groups[0].get("initial_lr", groups[0]["lr"])
            for group in groups:
                ratio = group.get("initial_lr", group["lr"]) / first if first else 1.0
                logs[f"lr/{group['part']}"] = logs["learning_rate"] * ratio
        super().log(logs, start_time)

    # -- validation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per supervised token of the validation samples, whatever the batch size and the number of
        devices.
        """
        dataset, args, model = self.eval_dataset, self.args, self.model
        plan = Plan(
            dataset.lengths,
            args.per_device_eval_batch_size * args.world_size,
            args.per_device_eval_batch_size,
            args.world_size,
        )
        loader = DataLoader(
            Planned(dataset), batch_sampler=PlannedBatches(plan, args.process_index), collate_fn=self.data_collator
        )
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=args.device)
        for batch in loader:
            batch.pop("index"), batch.pop("skipped", None)
            batch = self._prepare_inputs(batch)
            tokens = (batch["labels"][:, 1:] != IGNORE).sum()
            with self.compute_loss_context_manager():
                loss = model(**batch, num_items_in_batch=1).loss
            total += torch.stack([loss.double(), tokens.double()]).to(total)
        model.train()
        if args.world_size > 1:
            dist.all_reduce(total)
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1].clamp(min=1)).item()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Everything is written aside and appears at once under its name: a kill or a full disk costs no earlier
        checkpoint.
        """
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._aside = final.with_name(f".{final.name}.partial")
        with checkpoint.aside(final) if self.args.should_save else nullcontext():
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                inner = self._aside / final.name
                for path in list(inner.iterdir()):
                    path.rename(self._aside / path.name)
                inner.rmdir()
        self._aside = None
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self.args.output_dir, save_total_limit=self.args.save_total_limit, use_mtime=False
            )
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:  # called on all ranks: a sharded state was gathered by all of them
            self.save_to(Path(output_dir or self.args.output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        checkpoint.restore(self.model, Path(resume_from_checkpoint))
