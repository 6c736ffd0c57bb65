"""FSDP2: weights of a checkpoint go back into their shards. tests/distributed trains with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.checkpoint.test_checkpoint import LORA
from tests.tiny_vlm import build_moved_vlm
from tinyllava import checkpoint
from tinyllava.model.modules import is_sharded


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
