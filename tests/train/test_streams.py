"""Streams in training: a step's samples do not depend on ranks, workers or micro-batches, and a run resumes."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.train.tiny_run import recipe
from tinyllava.config import DataSpec, Recipe
from tinyllava.data.collate import Collator
from tinyllava.data.streaming import StreamingDataset
from tinyllava.errors import UserError
from tinyllava.hashes import seal
from tinyllava.runs import read_run
from tinyllava.train import stage
from tinyllava.train.batching import StreamLoader
from tinyllava.train.callbacks import read_metrics


def make_recipe(pictures: Path, specs: list[dict] | None = None, **trainer) -> Recipe:
    content = recipe(pictures, stages=("finetune",), max_steps=6, save_steps=3, **trainer)
    finetune = content.stages["finetune"]
    finetune.validation = None
    finetune.data = [
        DataSpec(**spec, images=str(pictures), streaming=True)
        for spec in specs or [{"path": str(pictures / "instructions.json")}]
    ]
    return content


@pytest.fixture(scope="module")
def two_sources(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """11 records in two files, and 24 in one, of which three are bad."""
    folder = tmp_path_factory.mktemp("streams")
    records = json.loads((pictures / "instructions.json").read_text())
    for number in (5, 6, 20):
        records[number]["image"] = "nowhere.png"
    (folder / "many.json").write_text(json.dumps(records))
    (folder / "few.jsonl").write_text(
        "\n".join(json.dumps({**one, "id": f"few {n}"}) for n, one in enumerate(records[7:18]))
    )
    return [{"path": str(folder / "many.json"), "weight": 3}, {"path": str(folder / "few.jsonl")}]


@pytest.fixture(scope="module")
def open_stream(
    pictures: Path, two_sources: list[dict], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], StreamingDataset]:
    content = make_recipe(pictures, two_sources)
    content.stages["finetune"].on_bad_sample = "skip"
    setup = stage.prepare_stage(content, "finetune", empty=True, output=tmp_path_factory.mktemp("run"))
    return lambda: stage.read_data(content, setup.stage, setup.vlm)[0]


def read_steps(loader: StreamLoader, steps: int, micros: int) -> list[dict[int, tuple]]:
    """{index: (id, ids of its tokens)} of each step."""
    batches, found = iter(loader), []
    for _ in range(steps):
        step = {}
        for batch in islice(batches, micros):
            for index, ids, mask in zip(
                batch["index"].tolist(), batch["input_ids"], batch["attention_mask"], strict=True
            ):
                step[index] = (loader.share.dataset.ids[index], ids[mask.bool()].tolist())
        found.append(step)
    return found


def make_loader(
    dataset: StreamingDataset, world: int = 1, rank: int = 0, micro: int = 2, workers: int = 0
) -> StreamLoader:
    options = {"num_workers": workers, "pin_memory": False, "persistent_workers": workers > 0}
    return StreamLoader(dataset, 8, micro, world, rank, Collator(0), **options)


def test_a_step_does_not_depend_on_how_it_is_executed(open_stream, tmp_path: Path) -> None:
    whole = read_steps(make_loader(open_stream()), 6, 4)
    assert [sorted(step) for step in whole] == [list(range(8 * n, 8 * n + 8)) for n in range(6)]
    assert read_steps(make_loader(open_stream(), micro=4, workers=2), 6, 2) == whole
    ranks = [read_steps(make_loader(open_stream(), 2, rank, micro=1, workers=rank), 6, 4) for rank in range(2)]
    assert [{**left, **right} for left, right in zip(*ranks, strict=True)] == whole

    for rank in range(4):  # stopped by 4 ranks, resumed by 2 and by 1
        loader = make_loader(open_stream(), 4, rank)
        read_steps(loader, 2, 1)
        loader.save(tmp_path, rank)
    for world in (1, 2):
        found = [{}] * 4
        for rank in range(world):
            loader = make_loader(open_stream(), world, rank, micro=1, workers=world - 1)
            loader.load(tmp_path, 2)
            found = [{**left, **right} for left, right in zip(found, read_steps(loader, 4, 8 // world), strict=True)]
        assert found == whole[2:]
    (tmp_path / "stream-3.json").unlink()
    with pytest.raises(UserError, match=r"does not say where 2 of 8 lanes of the streamed data are"):
        make_loader(open_stream()).load(tmp_path, 2)


def test_weights_hold_for_ever_and_in_every_lane(open_stream) -> None:
    dataset = open_stream()
    for weights in ([3, 1], [1000, 1], [1, 1, 1], [0.2, 5, 0.01]):
        dataset.shares = torch.tensor(weights).cumsum(0).numpy() / sum(weights)
        chosen = [[dataset.choose_source(step, lane) for lane in range(128)] for step in range(400)]
        for one in range(len(weights)):
            share = weights[one] / sum(weights)
            counts = [row.count(one) for row in chosen]
            assert abs(sum(counts) - share * 400 * 128) <= max(8, 0.002 * 400 * 128 * share)
            assert all(abs(count - share * 128) <= 5 for count in counts)  # every step has them in proportion
            lanes = [sum(row[lane] == one for row in chosen) for lane in range(128)]
            assert all(abs(count - share * 400) <= 6 for count in lanes)


def test_a_source_that_ends_begins_again(open_stream) -> None:
    """The smaller one was left out of the mixture when it ended."""
    steps = read_steps(make_loader(open_stream(), micro=8), 40, 1)
    late = Counter(identity.startswith("few") for step in steps[30:] for identity, _ in step.values())
    assert 17 <= late[True] <= 23  # a quarter of 80
    assert len({identity for step in steps for identity, _ in step.values()}) == 21 + 11


@pytest.fixture(scope="module")
def finished(pictures: Path, two_sources: list[dict], tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    output = tmp_path_factory.mktemp("finished")
    content = make_recipe(pictures, two_sources)
    content.stages["finetune"].on_bad_sample = "skip"
    stage.run(content, "tiny", output)
    return content, output


def read_lines(output: Path) -> list[tuple]:
    lines = read_metrics(output / "finetune" / "metrics.jsonl")
    return [(line["step"], line["epoch"], line["loss"]) for line in lines if "loss" in line]


def test_a_run_resumes_where_its_stream_was(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    content, output = finished
    run = Path(shutil.copytree(output, tmp_path / "run"))
    for name in ("final", "checkpoint-6"):
        shutil.rmtree(run / "finetune" / name)
    record = json.loads((run / "finetune" / "checkpoint-3" / "tinyllava.json").read_text())
    assert "stream-0.json" in record["training_state"]
    content = content.model_copy(deep=True)
    content.stages["finetune"].trainer |= {"dataloader_num_workers": 2, "per_device_train_batch_size": 2}
    stage.run(content, "tiny", run)
    before, after = read_lines(output), read_lines(run)
    assert [line[:2] for line in before] == [line[:2] for line in after]
    assert [line[2] for line in after] == pytest.approx([line[2] for line in before], rel=1e-5)


def test_bad_records_of_worker_processes_reach_the_record(finished: tuple[Recipe, Path]) -> None:
    """48 samples of 24 and 11 records: all are read in a pass."""
    bad = read_run(finished[1] / "finetune" / "final")["bad_samples"]
    assert set(bad["missing_image"]["ids"]) == {"i5", "i6", "i20"}


def test_a_stream_of_an_earlier_version_is_refused(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    """Its order was another one, and its checkpoints do not say where it was."""
    content, output = finished
    run = Path(shutil.copytree(output, tmp_path / "run"))
    for name in ("final", "checkpoint-6"):
        shutil.rmtree(run / "finetune" / name)
    folder = run / "finetune" / "checkpoint-3"
    (folder / "stream-0.json").unlink()
    record = json.loads((folder / "tinyllava.json").read_text())
    del record["training_state"]["stream-0.json"]
    (folder / "tinyllava.json").write_text(seal(record))
    with pytest.raises(UserError, match=r"8 of 8 lanes .* An earlier version wrote it.*--overwrite"):
        stage.run(content, "tiny", run)
