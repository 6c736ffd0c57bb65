"""Look at the loss of every step: a NaN ends the run, and a spike is named with its samples.

The losses stay on the device until they are logged or saved anyway, so that no step waits for the device.
"""

import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerState

from tinyllava.data.dataset import SupervisedDataset
from tinyllava.data.streaming import StreamingDataset
from tinyllava.errors import UserError

logger = logging.getLogger("tinyllava")
# A spike is further above the median of the last losses than SPIKE robust standard deviations (1.4826 * MAD, Leys et
# al. 2013), and by more than RISE nats: a loss near zero has almost no deviation. In both stages of quickstart (16
# samples a step, 517 steps), no undisturbed step is further above it than 2.8 deviations and 0.38 nats.
SPIKE, RISE, HISTORY, LEAST_HISTORY = 6.0, 0.5, 100, 20
MOST_UNREAD = 50  # steps that are kept on the device
MOST_WARNINGS = 20  # of a stage; metrics.jsonl has all spikes


@dataclass
class Spike:
    """A step whose loss is far above the usual one, or not a number. samples: first those of the worst micro-batch."""

    step: int
    loss: float
    usual: float
    samples: list[int]


class LossGuard:
    """The losses of all steps of a stage. `add` keeps them on the device, and `check` looks at them.

    skipped_steps: those of which no image could be read.
    """

    def __init__(
        self,
        dataset: SupervisedDataset | StreamingDataset,
        model: nn.Module,
        add_line: Callable[[TrainerState, dict[str, Any]], None],
        is_fp16: bool,
    ) -> None:
        self.dataset, self.model, self.add_line, self.is_fp16 = dataset, model, add_line, is_fp16
        self.unread: list[tuple[int, Tensor, list[int]]] = []  # (step, loss, samples) of each micro-batch
        self.last: deque[float] = deque(maxlen=HISTORY)
        self.spikes = 0
        self.skipped_steps: list[int] = []
        self.logged = 0  # the step of the last log

    @property
    def is_full(self) -> bool:
        """Whether `check` should be called, although nothing is logged."""
        return len(self.unread) >= MOST_UNREAD

    def add(self, step: int, loss: Tensor, samples: list[int]) -> None:
        """Keep the loss of a micro-batch."""
        self.unread.append((step, loss, samples))

    def skip(self, step: int, batches: list[dict[str, Tensor]]) -> None:
        """Count a step in which no rank has a supervised token. Raises UserError if none of its samples was skipped."""
        ids = list_ids(self.dataset, torch.cat([batch["index"] for batch in batches]).tolist())
        if not sum(gather_object([sum(int(batch["skipped"].sum()) for batch in batches if "skipped" in batch)])):
            raise UserError(f"step {step} has no supervised token (samples {ids}). Check the template.")
        self.skipped_steps.append(step)
        logger.warning("step %d is skipped: no image of its samples can be read (%s)", step, ids)

    def correct_mean(self, logs: dict[str, float], step: int) -> None:
        """Take the mean loss since the last log over the steps that were not skipped. It is NaN without such a step."""
        skipped = sum(at > self.logged for at in self.skipped_steps)
        if skipped and step > self.logged:
            trained = step - self.logged - skipped
            logs["loss"] = logs["loss"] * (step - self.logged) / trained if trained else math.nan
        self.logged = step

    def check(self, state: TrainerState) -> None:
        """Report the spikes since the last call. All ranks must call it. Raises UserError for a NaN or infinity."""
        for spike in self.find_spikes():
            ids = list_ids(self.dataset, spike.samples)
            if not math.isfinite(spike.loss):
                is_half = any(p.dtype == torch.float16 for p in self.model.parameters() if p.requires_grad)
                remedy = ", or train in bf16 instead of fp16" if self.is_fp16 else ""
                remedy = remedy or (", or remove `model.dtype: float16`" if is_half else "")
                raise UserError(
                    f"the loss of step {spike.step} is {spike.loss} (samples {ids}). Lower the learning rate{remedy}."
                    " Earlier checkpoints are intact."
                )
            self.spikes += 1
            loss, usual = round(spike.loss, 4), round(spike.usual, 4)
            if self.spikes <= MOST_WARNINGS:
                logger.warning("step %d has a loss of %s; %s is usual. Samples: %s", spike.step, loss, usual, ids)
            facts = {"step": spike.step, "loss_spike": loss, "usual_loss": usual, "samples": ids}
            self.add_line(state, facts)

    def finish(self, state: TrainerState) -> None:
        """Check the last losses. Raises UserError if every step of the stage was skipped."""
        self.check(state)
        if len(self.skipped_steps) == state.global_step > 0:
            raise UserError(
                f"all {state.global_step} steps were skipped: no image can be read. See `tinyllava data check RECIPE`."
            )

    def find_spikes(self) -> Iterator[Spike]:
        """The spikes among the losses that were not looked at yet."""
        unread, self.unread = self.unread, []
        if not unread:
            return
        local = torch.stack([loss.float() for _, loss, _ in unread])
        steps = sorted({step for step, _, _ in unread})
        which = torch.tensor([steps.index(step) for step, _, _ in unread], device=local.device)
        total = torch.zeros(len(steps), device=local.device).index_add_(0, which, local)
        if dist.is_initialized():  # each rank's loss is scaled by their number
            dist.all_reduce(total)
            total /= dist.get_world_size()
        values = local.tolist()
        for step, loss in zip(steps, total.tolist(), strict=True):
            usual, limit = self.find_limit()
            self.last.append(loss)
            if not loss <= limit:  # a NaN too
                mine = [(value, samples) for (at, _, samples), value in zip(unread, values, strict=True) if at == step]
                batches = list(gather_object(mine))
                batches.sort(key=lambda batch: -batch[0] if math.isfinite(batch[0]) else -math.inf)
                yield Spike(step, loss, usual, [sample for _, samples in batches for sample in samples])

    def find_limit(self) -> tuple[float, float]:
        """(the usual loss, the loss above which a step is a spike)"""
        known = [loss for loss in self.last if math.isfinite(loss)]
        if len(known) < LEAST_HISTORY:
            return math.nan, sys.float_info.max
        usual = median(known)
        deviation = 1.4826 * median(abs(loss - usual) for loss in known)
        return usual, usual + max(SPIKE * deviation, RISE)


def list_ids(dataset: SupervisedDataset | StreamingDataset, index: list[int], most: int = 8) -> str:
    """The ids of the first `most` samples."""
    names = [str(dataset.ids[sample])[:80] for sample in index[:most]]
    return ", ".join(names) + (" ..." if len(index) > most else "")
