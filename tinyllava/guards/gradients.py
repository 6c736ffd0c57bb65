"""Check while a stage trains that what is trained gets a gradient, and that what is frozen does not change.

A hook on each trained parameter waits until every part has had a gradient: normally for one step. The checksums of what
is frozen are computed at the start, after the first step and at the end.
"""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinyllava.checkpoint.weight_files import list_names
from tinyllava.config import PART_TITLES
from tinyllava.data.dataset import SupervisedDataset
from tinyllava.data.streaming import StreamingDataset
from tinyllava.errors import UserError
from tinyllava.model.modules import find_part, find_untrained_parts

# A gradient of exactly zero can be right at the beginning: behind a layer that starts at zero (a gate, LoRA's B), and
# with a warm-up from a learning rate of 0, it is zero for two steps.
ZERO_STEPS = 5
EXPERT = re.compile(r"\.experts\.\d+\.")  # an expert that no token was sent to has no gradient in that step


def require_images(stage: str, dataset: SupervisedDataset | StreamingDataset, parts: Sequence[str]) -> None:
    """Raise UserError if vision tower or connector are trained on data without a single image. parts: the trained."""
    trained = [part for part in parts if part != "llm"]
    if trained and isinstance(dataset, SupervisedDataset) and not dataset.has_images:
        tune = ", ".join(f"{part}: frozen" for part in trained)
        raise UserError(
            f"stage {stage}: no sample has an image, so the {PART_TITLES[trained[0]]} would get no gradient. Add data"
            f" with images, or set `tune: {{{tune}}}`."
        )


# -- gradients and frozen weights --------------------------------------------------------------------------------------


class PartGuard(TrainerCallback):
    """Raises UserError when a part that should train gets no gradient, and when a frozen one changes.

    has_images: set by the Trainer if a micro-batch of the step has an image. Else the gradients of vision tower and
    connector are zero (`make_idle_features`).
    """

    has_images = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Sum up what is frozen, and watch what is trained."""
        self.model, self.tries, self.reached = kwargs["model"], 0, set()
        self.checksums = sum_untrained(self.model)
        self.trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.moved = {find_part(name): torch.zeros((), device=args.device) for name in self.trained}
        # Not a hook after accumulation: ZeRO has taken the gradient away by then.
        hooks = {name: partial(self.note_gradient, name) for name in self.trained}
        self.hooks = [weight.register_hook(hooks[name]) for name, weight in self.trained.items()]

    def note_gradient(self, name: str, gradient: Tensor) -> None:
        """Remember that a parameter has a gradient, and whether any number in it is not zero."""
        self.reached.add(name)
        moved = self.moved[find_part(name)]
        moved.copy_(torch.maximum(moved, gradient.detach().any().to(moved)))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Check the gradients of this step, until every part has had one, and the frozen weights once."""
        for name, weight in self.trained.items() if self.hooks else ():
            if weight.grad is not None and name not in self.reached:  # FSDP2 computes with other tensors
                self.note_gradient(name, get_shard(weight.grad))
        if not self.hooks or not self.reached:  # a step without samples reaches nothing
            return
        self.check_reached(state.global_step + 1)
        flags = torch.stack([*self.moved.values(), torch.tensor(float(self.has_images), device=args.device)])
        self.has_images = False
        if args.world_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        still = [part for part, moved in zip(self.moved, flags.tolist(), strict=False) if not moved]
        self.tries += bool(flags[-1])
        if still and self.tries >= ZERO_STEPS:
            self.refuse(still[0], f"a gradient of exactly zero in {ZERO_STEPS} steps", self.trained)
        if not still:
            self.close()
            self.check_untrained()  # now and not only at the end: code that writes to them does so in each step

    def check_reached(self, step: int) -> None:
        """Raise UserError if a trained parameter has no gradient. ZeRO and FSDP would train on a gradient of zero."""
        missing = [name for name in self.trained if name not in self.reached and not EXPERT.search(name)]
        if missing:
            self.refuse(find_part(missing[0]), f"no gradient at step {step}", missing)

    def refuse(self, part: str, what: str, names: Iterable[str]) -> None:
        """Raise the UserError about a part that does not train."""
        listed = list_names((name for name in names if find_part(name) == part), 3)
        raise UserError(
            f"the {PART_TITLES[part]} is trained, but has {what}: {listed}. Its forward must use every trained"
            f" parameter without detach() or no_grad(). Or set `tune: {{{part}: frozen}}`."
        )

    def check_untrained(self) -> None:
        """Raise UserError if what is not trained has changed since the start."""
        now = sum_untrained(self.model)
        changed = [name for name, checksum in self.checksums.items() if now.get(name) != checksum]
        if changed:
            raise UserError(
                f"the {PART_TITLES[find_part(changed[0])]} has frozen weights that changed: {list_names(changed, 3)}."
                " Remove the code that writes to them, or train the part. No checkpoint was written of this state."
            )

    def check_finite(self) -> None:
        """Raise UserError if a trained weight is not a number: no checkpoint is written of such weights."""
        broken = [name for name, weight in self.trained.items() if not get_shard(weight).isfinite().all()]
        if broken:
            raise UserError(
                f"weights of the {PART_TITLES[find_part(broken[0])]} are not numbers: {list_names(broken, 3)}. Lower"
                " the learning rate. Earlier checkpoints are intact."
            )

    def finish(self) -> None:
        """Check the weights at the end of training. Raises UserError as the other checks, and if no image was seen."""
        if self.hooks and self.reached and not self.tries:
            self.refuse(next(iter(self.moved)), "no gradient, because no sample had an image", self.trained)
        self.close()
        self.check_finite()
        self.check_untrained()

    def close(self) -> None:
        """Remove the hooks."""
        while self.hooks:
            self.hooks.pop().remove()


def get_shard(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that ZeRO-3 or FSDP2 shards."""
    tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_untrained(model: nn.Module) -> dict[str, int]:
    """A checksum of each frozen parameter, and of each saved buffer in the parts whose base weights are not trained.

    It is the sum of the bytes as 64-bit integers: 12 GB/s on one core, as fast as the memory elsewhere. Trained parts
    change their buffers (BatchNorm's statistics), and a buffer that is not saved may change (RoPE's for long texts).
    """
    untrained, saved = find_untrained_parts(model), model.state_dict().keys()
    tensors = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    buffers = {name: buffer for name, buffer in model.named_buffers() if find_part(name) in untrained and name in saved}
    return {name: sum_bytes(get_shard(tensor)) for name, tensor in (tensors | buffers).items()}


def sum_bytes(tensor: Tensor) -> int:
    """The bytes of a tensor as a sum of 64-bit integers, modulo 2^64: it differs if a single bit does."""
    raw = tensor.contiguous().flatten().view(torch.uint8)
    if len(raw) % 8 or raw.storage_offset() % 8:
        raw = nn.functional.pad(raw, (0, -len(raw) % 8)).clone()
    return int(raw.view(torch.int64).sum())
