"""FSDP2 on CPU processes: the steps of one process, whole checkpoints, and weights that go back into their shards."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.checkpoint.test_checkpoint import LORA
from tests.tiny_vlm import build_moved_vlm
from tests.train.test_stage import ROOT, load_weights, read_losses
from tests.train.tiny_run import recipe
from tinyllava import checkpoint
from tinyllava.model.modules import is_sharded
from tinyllava.train import stage


def test_two_sharded_processes_run_the_same_steps_as_one(pictures: Path, tmp_path: Path) -> None:
    """Micro-batches of one sample: one process has a picture while the other has text alone."""
    tune = {"llm": {"lora": {"r": 4}, "lr": 5e-3}, "vision_tower": "frozen"}
    trainer = {"per_device_train_batch_size": 1, "num_train_epochs": 1}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["--tune", json.dumps(tune), "--trainer", json.dumps({**trainer, "fsdp": "full_shard"})]
    two = [*torchrun, "-m", "tests.train.fsdp_run", str(pictures), str(tmp_path / "two"), *options]
    done = subprocess.run(two, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "two" / "finetune" / "checkpoint-2").glob("*fsdp*"))  # it was FSDP
    one = stage.run(recipe(pictures, tune, **trainer), "tiny", tmp_path / "one")
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), rel=1e-4)
    ours, theirs = load_weights(one), load_weights(tmp_path / "two" / "finetune" / "final")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tune", [None, LORA], ids=["full", "lora"])
def test_shards_are_restored(tune: dict | None, tmp_path: Path, group: None) -> None:
    vlm = build_moved_vlm(tune)
    model = vlm.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    checkpoint.save(vlm, tmp_path)
    assert not is_sharded(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fully_shard(model)
    assert is_sharded(model)
    checkpoint.restore(model, tmp_path)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), before[name], rtol=0, atol=0, msg=name)
