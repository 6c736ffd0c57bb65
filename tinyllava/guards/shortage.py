"""Estimate the memory that a stage needs on each device, and say what to change when there is not enough."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import TrainingArguments

from tinyllava.data.dataset import SupervisedDataset
from tinyllava.data.labels import IGNORE
from tinyllava.data.streaming import StreamingDataset
from tinyllava.errors import UserError
from tinyllava.failures import describe_worker, find_dead_worker
from tinyllava.memory import Memory, Weights, compute_memory, count_saved, is_out_of_memory
from tinyllava.model.modeling import LOSS_CHUNK, TinyLlavaForConditionalGeneration
from tinyllava.model.modules import find_blocks
from tinyllava.model.quantise import count_weights

STATES = {"sgd": 0.0, "adafactor": 0.0, "lion": 1.0, "8bit": 0.5}  # numbers for each trained weight; Adam has 2

IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+")
CUT_OFF = re.compile(r"received \d+ items of ancdata")  # what multiprocessing says of a connection without its answer
DEATH = 5  # seconds that a killed process may need to end


class ShapedForward(nn.Module):
    """A training forward whose shapes do not depend on data, so that it can run on shapes alone."""

    def __init__(self, model: TinyLlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, pixels: Tensor | None, grids: Any, supervised: int) -> Tensor:
        """The loss of ids [B, L], views [V, 3, H, W], grids of tiles [I, 2] and a number of supervised positions."""
        model, embeddings = self.model, self.model.get_input_embeddings()(ids)
        if pixels is not None:
            features = torch.cat([*model.model.get_image_features(pixels, grids).pooler_output])
            mask = torch.ones(*embeddings.shape[:2], 1, dtype=torch.bool).expand_as(embeddings)
            embeddings = embeddings.masked_scatter(mask, features.to(embeddings.dtype))
        hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        logits = model.compute_logits(hidden.flatten(0, 1)[: min(supervised, LOSS_CHUNK)]).float()
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def count_activations(
    model: TinyLlavaForConditionalGeneration, item: dict[str, Any], samples: int, args: TrainingArguments
) -> int:
    """Bytes that a micro-batch of one item, repeated, keeps for its backward pass. It runs without memory and data."""
    forward, dtype = ShapedForward(model.train()), torch.bfloat16 if args.bf16 or args.fp16 else None
    tensors = {**dict(forward.named_parameters()), **dict(forward.named_buffers())}
    parts = (model.model.vision_tower, model.model.language_model)
    layers = [part.get_submodule(name) for part in parts for name in find_blocks(part)]
    grids = item["image_grids"].repeat(samples, 1).numpy() if "image_grids" in item else None
    supervised = samples * int((item["labels"] != IGNORE).sum())
    # The packed weights of 4-bit layers have no shape to multiply with: they keep nothing of their input.
    packed = [layer for layer in model.modules() if type(layer).__name__ == "Linear4bit"]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype, enabled=dtype is not None):
        state = {name: torch.empty(each.shape, dtype=each.dtype) for name, each in tensors.items()}
        for name, tensor in state.items():
            tensor.requires_grad_(tensors[name].requires_grad)
        ids = torch.zeros(samples, len(item["input_ids"]), dtype=torch.long)
        pixels = item["pixel_values"]
        if pixels is not None:
            pixels = torch.zeros(samples * len(pixels), *pixels.shape[1:], dtype=torch.uint8)
        for layer in packed:
            weight = torch.empty(layer.out_features, layer.in_features)
            layer.forward = lambda x, weight=weight: F.linear(x, weight.to(x.dtype))
        try:
            counted = count_saved(
                lambda: functional_call(forward, state, (ids, pixels, grids, supervised)), state.values(), layers
            )
        finally:
            for layer in packed:
                del layer.forward
    return counted.checkpointed if args.activation_checkpointing or args.gradient_checkpointing else counted.plain


def find_longest(dataset: SupervisedDataset | StreamingDataset) -> dict[str, Any]:
    """The longest sample; of a stream the first one."""
    return next(iter(dataset)) if isinstance(dataset, StreamingDataset) else dataset[int(dataset.lengths.argmax())]


def estimate_stage(
    model: TinyLlavaForConditionalGeneration,
    dataset: SupervisedDataset | StreamingDataset,
    args: TrainingArguments,
    engine: str | None = None,
    devices: int | None = None,
) -> Memory:
    """The memory on each device with micro-batches as long as the longest sample. engine, devices: else those of args.

    Raises RuntimeError for a model whose shapes depend on data.
    """
    activations = count_activations(model, find_longest(dataset), args.per_device_train_batch_size, args)
    zero = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin else 0
    engine = engine or (f"zero{zero}" if zero >= 2 else "fsdp" if args.fsdp else "ddp")
    state = next((number for name, number in STATES.items() if name in args.optim.value), 2.0)
    return compute_memory(
        measure_weights(model), activations, engine, devices or args.world_size, state, args.bf16 or args.fp16
    )


def measure_weights(model: TinyLlavaForConditionalGeneration) -> Weights:
    """The sizes of a tuned model."""
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    parts = (model.model.vision_tower, model.model.language_model)
    layers = [part.get_submodule(name) for part in parts for name in find_blocks(part)]
    return Weights(
        stored=sum(map(count_bytes, weights)),
        count=sum(map(count_weights, weights)),
        trained=sum(weight.numel() for weight in trained),
        trained_stored=sum(weight.nbytes for weight in trained),
        largest=max((sum(map(count_weights, layer.parameters())) for layer in layers), default=0),
    )


def count_bytes(weight: nn.Parameter) -> int:
    """The bytes of a weight. Packed into 4 bits it has 4.127 bits with its scales (arXiv 2305.14314, section 3)."""
    is_packed = type(weight).__name__ == "Params4bit"  # also on the meta device, where it is not packed yet
    return int(count_weights(weight) * 4.127 / 8) if is_packed else weight.nbytes


@contextmanager
def explain_out_of_memory(
    name: str,
    model: TinyLlavaForConditionalGeneration,
    dataset: SupervisedDataset | StreamingDataset,
    args: TrainingArguments,
) -> Iterator[None]:
    """Turn an error about memory into a UserError with the estimate, and what to change in which order."""
    try:
        yield
        return
    except (RuntimeError, MemoryError, OSError, EOFError) as error:
        # An error that a worker raised keeps its class, and names the worker and shows the traceback in its text.
        reason = find_dead_worker(error) or wait_for_death(error, args.dataloader_num_workers)
        if not reason and not is_out_of_memory(error):
            raise
        if not reason and (inside := IN_WORKER.match(str(error))):
            reason = f"{inside[0]}, out of memory"
    # Outside of `except`: there, the traceback would hold all tensors of the step.
    if reason:
        raise UserError(describe_worker(reason, f"dataloader_num_workers (now {args.dataloader_num_workers})"))
    raise UserError(describe_shortage(name, model, dataset, args))


def wait_for_death(error: BaseException, workers: int) -> str | None:
    """What torch says of the death of a data worker that broke a connection; None for any other error.

    A process that is killed closes its connections before it has ended. Only then torch's handler of SIGCHLD raises.
    """
    if not workers or not (isinstance(error, ConnectionError | EOFError) or CUT_OFF.search(str(error))):
        return None
    try:
        time.sleep(DEATH)
    except RuntimeError as death:
        return find_dead_worker(death)
    return None


def describe_shortage(
    name: str,
    model: TinyLlavaForConditionalGeneration,
    dataset: SupervisedDataset | StreamingDataset,
    args: TrainingArguments,
) -> str:
    """The message: the micro-batch, the longest sample, the estimate and the remedies that are not used yet."""
    longest, estimate = "", ""
    if isinstance(dataset, SupervisedDataset):
        index = int(dataset.lengths.argmax())
        longest = f" of up to {dataset.lengths[index]:,} positions (sample {dataset.ids[index]:.80})"
    with suppress(RuntimeError, MemoryError):  # not even that fits, or the shapes depend on data
        estimate = f"The stage needs {estimate_stage(model, dataset, args)}. "
    micro, sharded = args.per_device_train_batch_size, args.deepspeed or args.fsdp
    remedies = {
        f"per_device_train_batch_size: {micro // 2} (the result stays the same)": micro > 1,
        "activation_checkpointing: true": not (args.activation_checkpointing or args.gradient_checkpointing),
        "bf16: true": not (args.bf16 or args.fp16),
        "`tune: {llm: {lora: {}}}`": any(p.requires_grad and p.dim() > 1 for p in model.lm_head.parameters()),
        "a smaller max_length": True,
        "on several devices `fsdp: true` or `deepspeed: zero3`": not sharded,
    }
    listed = ", ".join(remedy for remedy, applies in remedies.items() if applies)
    return (
        f"out of memory in stage {name}, on {args.device} with per_device_train_batch_size {micro}, samples{longest}."
        f" {estimate}\nTry in this order: {listed}. Earlier checkpoints are intact."
    )
