"""Every engine trains the steps of one process, and leaves its checkpoints. Run it with `make test-distributed`."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.cases import CONNECTORS, STEPS, Case, make_recipe
from tests.distributed.conftest import IS_RUN, MORE, PIPELINES, UNREADABLE, Runs
from tests.distributed.launch import Ran, interrupt, read_steps
from tests.train.test_stage import load_weights
from tinyllava import checkpoint
from tinyllava.checkpoint.adapter import has_adapter
from tinyllava.factory import Factory
from tinyllava.runs import list_checkpoints, read_run
from tinyllava.train import stage

pytestmark = pytest.mark.skipif(not IS_RUN, reason="it has an environment of its own: run `make test-distributed`")
WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
    "fsdp": "FSDPTinyLlavaForConditionalGeneration",
}
SHARDS = {"ddp": "optimizer.pt", "zero2": "global_step*/*optim_states.pt", "zero3": "global_step*/*optim_states.pt"}
SHARDS |= {"fsdp": "optimizer.bin"}


def assert_same_steps(ran: Path, expected: Path, stage: str = "finetune") -> None:
    steps, reference = read_steps(ran, stage), read_steps(expected, stage)
    assert steps.keys() == reference.keys()
    for step, values in reference.items():
        expected = values if values[0] is None else pytest.approx(values, rel=1e-5)  # None: the step was skipped
        assert steps[step] == expected, f"(loss, norm of the gradient) of step {step}"


def assert_same_weights(directory: Path, expected: Path) -> None:
    ours, theirs = load_weights(directory), load_weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def assert_engine(ran: Ran, engine: str, world: int, stage: str = "finetune") -> None:
    for rank in ran.ranks:
        assert (rank["world"], rank["error"]) == (world, None)
        assert rank["engines"][stage] == WRAPPERS[engine]
    files = list((ran.output / stage / f"checkpoint-{STEPS}").glob(SHARDS[engine]))
    assert len(files) == (world if engine.startswith("zero") else 1)


def test_every_connector_has_its_case() -> None:
    assert set(CONNECTORS) == set(Factory("connectors").list_names())


def test_it_trains_the_steps_of_one_process(case: Case, one: Runs, two: Runs) -> None:
    ran = two[case.name]
    if case.is_refused:
        sharding = {"zero3": "ZeRO-3", "fsdp": "FSDP"}[case.engine]
        assert f"the llm is quantised, and {sharding} cannot shard packed weights. Use zero2 or DDP." in ran.error
        return
    reference = one[case.reference].output
    assert_engine(ran, case.engine, 2)
    # In some micro-batches one process has an image, and the other has text alone.
    assert any(first != second for first, second in zip(*(rank["images"] for rank in ran.ranks), strict=True))
    assert_same_steps(ran.output, reference)
    for name in ("checkpoint-2", "final"):
        assert_same_weights(ran.output / "finetune" / name, reference / "finetune" / name)
    middle = checkpoint.load(ran.output / "finetune" / "checkpoint-2")
    assert has_adapter(middle.model) == ("lora" in case.tuning)


@pytest.mark.parametrize("more", MORE, ids=lambda case: case.name)
def test_three_processes_train_the_same_steps(more: Case, one: Runs, three: Runs) -> None:
    assert_engine(three[more.name], more.engine, 3)
    assert_same_steps(three[more.name].output, one[more.reference].output)
    assert_same_weights(
        three[more.name].output / "finetune" / "final", one[more.reference].output / "finetune" / "final"
    )


@pytest.mark.parametrize("engines", PIPELINES, ids="-then-".join)
def test_each_stage_has_its_own_engine(engines: tuple[str, str], one: Runs, two: Runs) -> None:
    ran, reference = two["-then-".join(engines)], one["one-then-one"].output
    for name, engine in zip(("pretrain", "finetune"), engines, strict=True):
        assert_engine(ran, engine, 2, name)
        assert_same_steps(ran.output, reference, name)
    assert_same_weights(ran.output / "finetune" / "final", reference / "finetune" / "final")


@pytest.mark.parametrize("more", MORE, ids=lambda case: case.name)
def test_it_stops_early_with_the_best_weights(more: Case, one: Runs, two: Runs) -> None:
    ran, reference = two[f"stopped-{more.engine}"].output / "finetune", one["stopped"].output / "finetune"
    assert [path.name for path in list_checkpoints(ran)] == [path.name for path in list_checkpoints(reference)]
    assert read_run(ran / "final")["step"] == read_run(reference / "final")["step"] < 4
    assert_same_weights(ran / "final", reference / "final")
    assert_same_weights(ran / "final", list_checkpoints(ran)[-1])


@pytest.mark.parametrize("more", MORE, ids=lambda case: case.name)
def test_a_step_without_a_readable_image_is_skipped_by_all_processes(more: Case, one: Runs, two: Runs) -> None:
    """In the next step, one process has a single readable image, and the other has none."""
    ran, reference = two[f"unreadable-{more.engine}"], one["unreadable"].output
    assert_engine(ran, more.engine, 2)
    assert read_steps(reference)[2] == (None, 0)
    assert_same_steps(ran.output, reference)
    for name in ("checkpoint-2", "final"):
        assert_same_weights(ran.output / "finetune" / name, reference / "finetune" / name)
    record = json.loads((ran.output / "run.json").read_text())["stages"]["finetune"]
    assert (record["skipped_steps"], record["skipped_in_training"]) == (1, UNREADABLE)


def test_ddp_resumes_in_more_and_in_fewer_processes(
    mixed: Path, one: Runs, two: Runs, three: Runs, tmp_path: Path
) -> None:
    case = MORE[0]
    reference = one[case.reference].output
    begun = interrupt(two[case.name].output, tmp_path / "begun")
    stage.run(make_recipe(case, mixed), "tiny", begun)  # two, then one
    for ran in (begun, two["begun"].output, three[f"begun-{case.name}"].output):
        assert_same_steps(ran, reference)
        assert_same_weights(ran / "finetune" / "final", reference / "finetune" / "final")


@pytest.mark.parametrize("name", ["begun-fsdp-lora-mlp", "universal-zero2-lora-mlp"])
def test_sharded_runs_resume_in_more_processes(name: str, one: Runs, three: Runs) -> None:
    ran, reference = three[name], one[MORE[0].reference].output
    assert ran.error is None
    assert_same_steps(ran.output, reference)
    assert_same_weights(ran.output / "finetune" / "final", reference / "finetune" / "final")


@pytest.mark.parametrize("name", ["begun-zero2-lora-mlp", "begun-zero3-lora-mlp", "universal-zero3-lora-mlp"])
def test_zero_is_refused_in_more_processes_where_it_would_train_other_steps(name: str, three: Runs) -> None:
    error = three[name].error
    assert "the optimiser state is of 2 processes, not 3. Resume with 2" in error
    folder = three[name].output / "finetune" / "checkpoint-2" / "global_step2"
    assert (f"--input_folder {folder} --output_folder {folder}_universal`" in error) == ("zero2" in name)
