"""DeepSpeed ZeRO on two CPU processes: the steps of one process, and checkpoints as whole as its own.

Runs where deepspeed is installed (`pip install -e '.[deepspeed]'`); its first run builds an operator, which takes two
minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.test_stage import ROOT, load_weights, read_losses
from tests.train.tiny_run import recipe
from tinyllava import checkpoint
from tinyllava.checkpoint.adapter import has_adapter
from tinyllava.train import stage

pytest.importorskip("deepspeed")
DORA = {"llm": {"lora": {"r": 4, "use_dora": True}, "lr": 5e-3}, "vision_tower": "full"}
FULL = {"llm": "full", "vision_tower": "full"}


@pytest.mark.parametrize(
    "stages,tune",
    [(("zero3", "zero2"), DORA), (("zero2", "zero3"), DORA), (("zero3", "zero3"), FULL)],
    ids=["3-2-dora", "2-3-dora", "3-3-full"],
)
def test_two_sharded_processes_run_the_same_steps_as_one(
    stages: tuple, tune: dict, pictures: Path, tmp_path: Path
) -> None:
    """Micro-batches of one sample: one process has a picture while the other has text alone."""
    trainer = {"per_device_train_batch_size": 1, "num_train_epochs": 1}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["--tune", json.dumps(tune), "--trainer", json.dumps(trainer), "--deepspeed", *stages]
    two = [*torchrun, "-m", "tests.train.tiny_run", str(pictures), str(tmp_path / "two"), *options]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(two, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    shards = list((tmp_path / "two" / "finetune").glob("checkpoint-*/global_step*/*_optim_states.pt"))
    assert len(shards) >= 2  # it was DeepSpeed, on two ranks
    one = stage.run(recipe(pictures, tune, **trainer), "tiny", tmp_path / "one")
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), rel=1e-4)
    ours, theirs = load_weights(one), load_weights(tmp_path / "two" / "finetune" / "final")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    middle = checkpoint.load(tmp_path / "two" / "finetune" / "checkpoint-2")
    assert has_adapter(middle.model) == (tune is DORA)
