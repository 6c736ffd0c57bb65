"""The memory of a stage: the estimate against the allocator, and what users read when there is not enough."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from tests.cli_tools import CommandResult, run_command_line  # noqa: F401 (the fixture `tinyllava`)
from tests.conftest import LLAMA, tiny_model
from tests.train.test_stage import ROOT
from tests.train.tiny_run import recipe
from tinyllava.commands import follow
from tinyllava.config import DataSpec
from tinyllava.data.collate import Collator
from tinyllava.errors import UserError
from tinyllava.failures import describe_failure
from tinyllava.guards import shortage
from tinyllava.guards.shortage import estimate_stage, explain_out_of_memory
from tinyllava.memory import GIB, Memory, Weights, compute_memory, is_out_of_memory
from tinyllava.record import is_whole
from tinyllava.train import stage

BILLION = 10**9
LIMITED = """
import resource, sys
from transformers import TrainerCallback
from tinyllava import cli
from tinyllava.commands import follow

class Limit(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26, resource.RLIM_INFINITY))

follow.follow_stage = lambda *arguments: [Limit()]
cli.main(["train", sys.argv[1], "--output", sys.argv[2]])
"""


def test_out_of_memory_says_what_to_change(pictures: Path, tmp_path: Path) -> None:
    """The allocator really fails: the process may map 64 MiB more than before its first step."""
    records = json.loads((pictures / "instructions.json").read_text())
    for number, record in enumerate(records):
        record["conversations"][1]["value"] = "word " * (1500 if number == 7 else 1400)
    (tmp_path / "long.json").write_text(json.dumps(records))
    run = recipe(pictures, stages=("finetune",), num_train_epochs=1, per_device_train_batch_size=8, save_strategy="no")
    run.stages["finetune"].data = [DataSpec(path=str(tmp_path / "long.json"), images=str(pictures))]
    run.stages["finetune"].validation = None
    (tmp_path / "long.yaml").write_text(run.to_yaml())
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "long.yaml"), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    expected = r"out of memory in stage finetune, on cpu with per_device_train_batch_size 8, samples of up to [\d,]+"
    assert re.search(rf"{expected} positions \(sample t7\).* about [\d.]+ MiB per device: weights", done.stderr), (
        done.stderr
    )
    assert re.search(r"per_device_train_batch_size: 4 .*activation_checkpointing.*bf16.*lora.*max_length", done.stderr)


class Killer(TrainerCallback):
    """Kills a data worker in the fourth step, and then raises an error, if one is given."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            (worker, *_) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
            if self.error:
                raise self.error


@pytest.mark.parametrize("error", [None, ConnectionResetError(104, "reset"), EOFError()], ids=repr)
def test_a_data_worker_that_is_killed_is_named(
    error: Exception | None,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tinyllava: Callable[..., CommandResult],
) -> None:
    """The connection to it may break before torch knows that it ended. The same command then resumes."""
    run = recipe(pictures, stages=("finetune",), dataloader_num_workers=1)
    (tmp_path / "tiny.yaml").write_text(run.to_yaml())
    command = ["train", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run")]
    monkeypatch.setattr(follow, "follow_stage", lambda *arguments: [Killer(error)])
    code, _, said = tinyllava(*command)
    assert code == 2 and "Traceback" not in said, said[-3000:]
    assert re.search(r"a process that reads data died: .*dataloader_num_workers \(now 1\)", " ".join(said.split())), (
        said
    )
    assert is_whole(tmp_path / "run" / "finetune" / "checkpoint-2")


def test_other_errors_beside_data_workers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a tracker's connection, and one that a worker's code raised, are not a death. Its memory may be."""
    monkeypatch.setattr(shortage, "DEATH", 0.1)
    args = SimpleNamespace(dataloader_num_workers=2)
    text = "Caught {} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ..."
    for error in (ConnectionResetError(104, "reset"), RuntimeError(text.format("RuntimeError")), EOFError()):
        with pytest.raises(type(error)) as raised, explain_out_of_memory("finetune", None, None, args):
            raise error
        assert raised.value is error
    with (
        pytest.raises(UserError, match=r"worker process 0, out of memory\. .*dataloader_num_workers \(now 2\)") as told,
        explain_out_of_memory("finetune", None, None, args),
    ):
        raise MemoryError(text.format("MemoryError"))
    assert "\n" not in str(told.value)


def test_a_death_that_torch_tells_of_in_a_cleanup_is_no_traceback() -> None:
    text = "DataLoader worker (pid 3041) is killed by signal: Bus error. It is possible that ...\nRaise your limit."
    said = describe_failure(RuntimeError(text))
    assert said and said.startswith("a process that reads data died: DataLoader worker (pid 3041) is killed by signal")
    assert "Raise" not in said and describe_failure(RuntimeError("DataLoader worker process 0")) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.10 GB)"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_errors_of_allocators_are_known(error: BaseException) -> None:
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    "engine,devices,weights,gradients,optimiser",
    [  # a model of 1 B trained weights, by the papers' bytes for a weight
        ("ddp", 1, 4, 4, 8),
        ("ddp", 2, 4, 8, 8),  # and the buckets
        ("fsdp", 8, 0.5 + 0.04, 0.5, 1),
        ("zero2", 8, 2, 0.25, 1.5),
        ("zero3", 8, 0.25 + 0.04, 0.25, 1.5),
        ("zero3", 1, 2, 2, 12),
    ],
)
def test_what_an_engine_divides(engine: str, devices: int, weights: float, gradients: float, optimiser: float) -> None:
    sizes = Weights(4 * BILLION, BILLION, BILLION, 4 * BILLION, largest=BILLION // 100)
    memory = compute_memory(sizes, 0, engine, devices, is_half=True)
    assert memory.weights == pytest.approx(weights * BILLION) and memory.gradients == pytest.approx(gradients * BILLION)
    assert memory.optimiser == pytest.approx(optimiser * BILLION) and memory.total == pytest.approx(
        (weights + gradients + optimiser) * BILLION
    )


def test_a_frozen_part_costs_its_weights_alone() -> None:
    sizes = Weights(6 * BILLION, 3 * BILLION, 10**7, 4 * 10**7, 10**8)
    assert str(compute_memory(sizes, GIB)) == (
        "about 6.7 GiB per device: weights 5.6, gradients 0.0, optimiser 0.1, activations 1.0"
    )
    assert Memory(1, 2, 3, 4).total == 10


@pytest.mark.parametrize("trainer", [{}, {"bf16": True}, {"activation_checkpointing": True}], ids=str)
@pytest.mark.parametrize(
    "tune", [{"llm": "full", "vision_tower": "full"}, {"llm": "frozen"}, {"llm": {"lora": {}}}], ids=str
)
def test_the_estimate_is_what_autograd_keeps(trainer: dict, tune: dict, pictures: Path, tmp_path: Path) -> None:
    """A real forward pass of the longest micro-batch keeps this, to a quarter."""
    llm = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    run = recipe(pictures, tune, tiny_model(llm=llm), ("finetune",), **trainer)
    setup = stage.prepare_stage(run, "finetune", output=tmp_path)
    model, dataset = setup.vlm.model.train(), setup.dataset
    expected = estimate_stage(model, dataset, setup.args).activations
    if trainer.get("activation_checkpointing"):
        plain = recipe(pictures, tune, tiny_model(llm=llm), ("finetune",))
        args = stage.prepare_stage(plain, "finetune", output=tmp_path).args
        assert expected < 0.8 * estimate_stage(model, dataset, args).activations
        return
    item = dataset[int(dataset.lengths.argmax())]
    batch = Collator(0)([item] * setup.args.per_device_train_batch_size)
    batch.pop("index")
    known = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    dtype = torch.bfloat16 if trainer else torch.float32
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=bool(trainer)):
        loss = model(**batch).loss
    real = sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in known)
    assert loss.requires_grad and real == pytest.approx(expected, rel=0.25)
