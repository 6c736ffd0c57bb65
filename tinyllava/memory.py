"""The memory of training: its arithmetic, what a forward pass keeps for the backward pass, and errors of allocators.

How exact it is: the estimate was 0.95 (connector alone) to 1.06 (connector and LLM) of the peak that torch's profiler
saw in the CPU allocator in three AdamW steps. The models had 5 to 14 M weights. Measured were: connector, LLM, LoRA,
all with the tower, bf16, activation checkpointing. Not measured: GPUs, quantised or large models, several devices.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

GIB = 2**30
SHARDED = ("zero2", "zero3", "fsdp")
# What allocators and libraries say. torch's CPU allocator raises a RuntimeError, and the operating system an OSError.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "defaultcpuallocator",
    "std::bad_alloc",
    "alloc_failed",
    "resource exhausted",
)


@dataclass(frozen=True)
class Memory:
    """Bytes per device while a stage trains."""

    weights: float
    gradients: float
    optimiser: float
    activations: float

    @property
    def total(self) -> float:
        """All of it. The context of a GPU (0.3 to 1 GiB) and fragments come on top."""
        return self.weights + self.gradients + self.optimiser + self.activations

    def __str__(self) -> str:
        unit, size = ("GiB", GIB) if self.total >= GIB / 2 else ("MiB", 2**20)
        pieces = ", ".join(f"{name} {value / size:.1f}" for name, value in vars(self).items())
        return f"about {self.total / size:.1f} {unit} per device: {pieces}"


@dataclass(frozen=True)
class Weights:
    """The weights of a model: bytes as they are stored, and numbers. largest: numbers in its largest layer."""

    stored: int
    count: int
    trained: int
    trained_stored: int
    largest: int


def compute_memory(
    weights: Weights,
    activations: float,
    engine: str = "ddp",
    devices: int = 1,
    state: float = 2.0,
    is_half: bool = False,
) -> Memory:
    """The bytes per device with an engine (ddp, zero2, zero3, fsdp) on a number of devices.

    state: numbers that the optimiser keeps for each trained weight: 2 for Adam. is_half: bf16 or fp16.

    Without an engine, weights, gradients and Adam's moments have the precision in which weights are stored, 4 + 4 + 8
    bytes for a weight that trains. DDP copies gradients into buckets (torch's DistributedDataParallel, with
    gradient_as_bucket_view false). FSDP2 divides all of that and gathers a layer while the next one is fetched.
    DeepSpeed in bf16 has 2 + 2 bytes and a master copy with moments of 12 (arXiv 1910.02054, section 3.1): ZeRO-2
    divides the last two terms, and ZeRO-3 all.
    """
    if engine not in SHARDED:
        gradients = weights.trained_stored * (2 if devices > 1 else 1)
        return Memory(weights.stored, gradients, state * weights.trained_stored, activations)
    size = 2 if is_half else 4
    if engine == "fsdp":
        gathered = 2 * size * weights.largest if devices > 1 else 0
        shares = (weights.stored, weights.trained_stored, state * weights.trained_stored)
        kept, gradients, optimiser = (share / devices for share in shares)
        return Memory(kept + gathered, gradients, optimiser, activations)
    gathered = 2 * size * weights.largest if engine == "zero3" and devices > 1 else 0
    kept = size * weights.count / (devices if engine == "zero3" else 1) + gathered
    return Memory(kept, size * weights.trained / devices, 4 * (1 + state) * weights.trained / devices, activations)


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass keeps for its backward pass.

    plain: all that autograd saves. checkpointed: with activation checkpointing, where the inputs of the layers are kept
    instead, and one layer is computed again at a time.
    """

    plain: int
    checkpointed: int


def count_saved(run: Callable[[], Any], known: Iterable[Any], layers: Iterable[Any] = ()) -> Saved:
    """What `run` saves, without the tensors `known`. layers: the modules that can be checkpointed."""
    import torch

    kept = {}  # {address of a storage: (the tensor, so that its address is not given to another, the layer)}
    weights = {tensor.untyped_storage()._cdata for tensor in known}
    inside: list[Any] = []
    inputs = {}

    def enter(layer: Any, arguments: tuple) -> None:
        inside.append(layer)
        inputs[layer] = arguments[0].nbytes if arguments else 0

    def pack(tensor: Any) -> Any:
        address = tensor.untyped_storage()._cdata
        if address not in weights:
            kept.setdefault(address, (tensor, inside[-1] if inside else None))
        return tensor

    layers = list(layers)
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(lambda *_: inside.pop() and None) for layer in layers]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    sizes: dict[Any, int] = {}
    for tensor, layer in kept.values():
        sizes[layer] = sizes.get(layer, 0) + tensor.untyped_storage().nbytes()
    largest = max((size for layer, size in sizes.items() if layer is not None), default=0)
    return Saved(sum(sizes.values()), sizes.get(None, 0) + sum(inputs.values()) + largest)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, or of the machine, is used up."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in text for phrase in OUT_OF_MEMORY)
