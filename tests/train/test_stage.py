"""Runs: any mix of tunings trains and saves, a killed run ends as an undisturbed one, and a batch's shape changes
nothing.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import CLIP, DINOV2, PHI, tiny_model
from tests.tiny_vlm import build_tiny
from tests.train.tiny_run import recipe
from tinyllava import checkpoint
from tinyllava.checkpoint.adapter import has_adapter
from tinyllava.commands.follow import follow_stage
from tinyllava.errors import UserError
from tinyllava.train import stage
from tinyllava.train.record import RunRecord
from tinyllava.train.start import start_stage

ROOT = Path(__file__).parents[2]
LORA = {"lora": {"r": 4, "alpha": 8}}
PARTIAL = {"partial": {"last": 1}}


def read_losses(run: Path, name: str = "finetune") -> dict[int, float]:
    lines = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def load_weights(directory: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(directory).model.state_dict()


def test_both_stages_train_and_leave_everything(pictures: Path, tmp_path: Path) -> None:
    final = stage.run(recipe(pictures), "tiny", tmp_path / "run", follow=follow_stage)
    assert final == tmp_path / "run" / "finetune" / "final"
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["stages"]["finetune"]["finished"] and record["versions"]["torch"]
    assert record["stages"]["finetune"]["data"][0]["fingerprint"]
    curve = read_losses(tmp_path / "run")
    assert len(curve) == 9 and curve[9] < curve[1]
    for name in ("pretrain", "finetune"):
        assert (tmp_path / "run" / name / "curve.png").stat().st_size > 1000
    assert "num_train_epochs: 3" in (tmp_path / "run" / "recipe.yaml").read_text()
    before, after = load_weights(tmp_path / "run" / "pretrain" / "final"), load_weights(final)
    assert not torch.equal(
        before["model.multi_modal_projector.linear_1.weight"], after["model.multi_modal_projector.linear_1.weight"]
    )
    tower = "vision_tower.safetensors"  # frozen all the way: one file on disk
    assert (tmp_path / "run" / "pretrain" / "final" / tower).samefile(final / tower)
    stamp = (final / "tinyllava.json").stat().st_mtime_ns
    assert stage.run(recipe(pictures), "tiny", tmp_path / "run") == final
    assert (final / "tinyllava.json").stat().st_mtime_ns == stamp  # nothing was done again


def test_validation_data_cannot_stream(pictures: Path) -> None:
    streamed = recipe(pictures)
    finetune = streamed.stages["finetune"]
    finetune.data[0].streaming = True  # a share of it is held out
    with pytest.raises(UserError, match="validation data cannot stream"):
        stage.prepare_stage(streamed, "finetune", empty=True)
    finetune.validation, finetune.data = finetune.data, recipe(pictures).stages["finetune"].data
    with pytest.raises(UserError, match="validation data cannot stream"):
        stage.prepare_stage(streamed, "finetune", empty=True)


def test_a_format_that_streams_by_itself_is_refused_too(pictures: Path, tmp_path: Path) -> None:
    """The arguments are checked before the data is opened, and only then it is known that such data streams."""
    plain, streamed = recipe(pictures, max_steps=-1, num_train_epochs=1), recipe(pictures)
    plain.stages["finetune"].validation = None
    setup = stage.prepare_stage(plain, "finetune", output=tmp_path)
    data = streamed.stages["finetune"]
    data.data[0].streaming = True
    data.validation = 0.5
    with pytest.raises(UserError, match="validation data cannot stream"):
        stage.read_data(streamed, data, setup.vlm)
    data.validation = None
    setup.dataset, _ = stage.read_data(streamed, data, setup.vlm)
    with pytest.raises(UserError, match="streaming data requires `max_steps`"):
        stage.make_trainer(setup, "finetune", tmp_path, RunRecord(tmp_path, plain, "tiny"))


def test_a_directory_with_another_run_is_refused(pictures: Path, tmp_path: Path) -> None:
    record = RunRecord(tmp_path, recipe(pictures), "tiny")
    record.write()
    with pytest.raises(UserError, match=r"another recipe.*--output.*--overwrite"):
        stage.run(recipe(pictures, learning_rate=1.0), "tiny", tmp_path)


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_a_killed_run_ends_as_an_undisturbed_one(tuning: str, pictures: Path, tmp_path: Path) -> None:
    options = {} if tuning == "full" else {"r": 4, "alpha": 8, "use_dora": True}
    tune = {"llm": {tuning: options, "lr": 5e-3}}
    command = [sys.executable, "-m", "tests.train.tiny_run", str(pictures), str(tmp_path / "k")]
    options = ["--kill-at", "5", "--tune", json.dumps(tune)]
    killed = subprocess.run([*command, *options], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert (tmp_path / "k" / "finetune" / "checkpoint-4").is_dir()
    resumed = stage.run(recipe(pictures, tune), "tiny", tmp_path / "k")
    whole = stage.run(recipe(pictures, tune), "tiny", tmp_path / "w")
    assert read_losses(tmp_path / "k") == read_losses(tmp_path / "w")
    for name, tensor in load_weights(whole).items():
        torch.testing.assert_close(load_weights(resumed)[name], tensor, rtol=0, atol=0)


def test_a_checkpoint_in_the_middle_is_complete(pictures: Path, tmp_path: Path) -> None:
    stage.run(recipe(pictures, {"llm": LORA}), "tiny", tmp_path)
    middle = tmp_path / "finetune" / "checkpoint-8"
    vlm = checkpoint.load(middle)
    assert has_adapter(vlm.model) and vlm.record["run"]["step"] == 8 and vlm.processor.tokens_per_image == 16
    start, end = load_weights(tmp_path / "pretrain" / "final"), vlm.model.state_dict()
    name = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(start[name], end[name])  # the trained connector, not the one the stage began with
    for file in ("language_model.safetensors", "vision_tower.safetensors"):  # under the adapter nothing changed
        assert (tmp_path / "pretrain" / "final" / file).samefile(middle / file)


@pytest.mark.parametrize(
    "tune",
    [
        {"llm": LORA, "connector": "frozen", "vision_tower": LORA},
        {"llm": PARTIAL, "vision_tower": {**PARTIAL, "lr": 1e-4}},
        {"llm": "full", "vision_tower": "full"},
        {"llm": "full", "vision_tower": LORA},
        {"llm": LORA, "vision_tower": "full", "connector": LORA},
        {"llm": "frozen", "vision_tower": PARTIAL},
    ],
    ids=str,
)
@pytest.mark.parametrize("tower", [CLIP, DINOV2], ids=lambda config: config["model_type"])
def test_checkpointed_gradients_are_the_same_in_every_mix(
    tune: dict, tower: dict, pictures: Path, tmp_path: Path
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(llm=PHI, tower=tower)
        run = recipe(pictures, tune, model, ("finetune",), gradient_checkpointing=checkpointing)
        setup = stage.prepare_stage(run, "finetune", output=tmp_path)
        trainer = stage.make_trainer(setup, "finetune", tmp_path, RunRecord(tmp_path / str(checkpointing), run, "tiny"))
        if checkpointing:
            setup.vlm.model.gradient_checkpointing_enable()
        for name, parameter in setup.vlm.model.named_parameters():  # B starts at zero, where A would get no gradient
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        setup.vlm.model.train()
        batch = trainer.data_collator([setup.dataset[index] for index in range(4)])
        batch.pop("index")
        setup.vlm.model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in setup.vlm.model.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, msg=name)
    for part, place in (("vision_tower", "vision_tower"), ("llm", "language_model")):
        assert any(place in name for name in plain) == (tune.get(part, "frozen") != "frozen")


def test_how_a_step_is_run_does_not_change_it(pictures: Path, tmp_path: Path) -> None:
    """Micro-batches of 8, 2 and 1: the loss is a mean over the tokens of the global batch."""
    curves = []
    for micro in (8, 2, 1):
        run = recipe(pictures, stages=("finetune",), per_device_train_batch_size=micro, num_train_epochs=1)
        stage.run(run, "tiny", tmp_path / str(micro))
        curves.append(read_losses(tmp_path / str(micro)))
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], rel=1e-5)


def test_two_processes_run_the_same_steps_as_one(pictures: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = {"label_smoothing_factor": 0.1}
    two = [*torchrun, "-m", "tests.train.tiny_run", str(pictures), str(tmp_path / "two")]
    two += ["--trainer", json.dumps(options)]
    done = subprocess.run(two, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    stage.run(recipe(pictures, **options), "tiny", tmp_path / "one")
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), rel=1e-4)
    ours, theirs = (
        load_weights(tmp_path / "one" / "finetune" / "final"),
        load_weights(tmp_path / "two" / "finetune" / "final"),
    )
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def test_a_batch_without_images_gives_the_connector_a_gradient_of_zero(pictures: Path, tmp_path: Path) -> None:
    setup = stage.prepare_stage(recipe(pictures, {"llm": "full", "vision_tower": "full"}), "finetune", output=tmp_path)
    setup.vlm.model.train()
    text = [index for index in range(len(setup.dataset)) if setup.dataset[index]["pixel_values"] is None]
    item = setup.dataset[text[0]]
    setup.vlm.model(input_ids=item["input_ids"][None], labels=item["labels"][None]).loss.backward()
    for name, parameter in setup.vlm.model.named_parameters():
        if parameter.requires_grad and "language_model" not in name and "lm_head" not in name:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_loss_that_is_no_number_stops_with_step_and_samples(pictures: Path, tmp_path: Path) -> None:
    run = recipe(pictures, stages=("finetune",))
    setup = stage.prepare_stage(run, "finetune", output=tmp_path)
    with torch.no_grad():
        setup.vlm.model.model.multi_modal_projector.linear_1.weight.fill_(float("nan"))
    trainer = stage.make_trainer(setup, "finetune", tmp_path, RunRecord(tmp_path, run, "tiny"))
    with pytest.raises(UserError, match=r"loss of step 1 is nan \(samples i\d+"):
        trainer.train()


def test_nothing_supervised_stops(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recipe(pictures, stages=("finetune",))
    setup = stage.prepare_stage(run, "finetune", output=tmp_path)
    cls = type(setup.dataset)
    original = cls.__getitem__
    monkeypatch.setattr(
        cls,
        "__getitem__",
        lambda self, i: {**(item := original(self, i)), "labels": torch.full_like(item["labels"], -100)},
    )
    trainer = stage.make_trainer(setup, "finetune", tmp_path, RunRecord(tmp_path, run, "tiny"))
    with pytest.raises(UserError, match="step 1 has no supervised token"):
        trainer.train()


def test_skipped_samples_are_counted_in_the_record(pictures: Path, tmp_path: Path) -> None:
    records = json.loads((pictures / "instructions.json").read_text())
    records[2]["conversations"][1]["value"] = ""
    records[3]["image"] = "nowhere.png"
    data = tmp_path / "bad.json"
    data.write_text(json.dumps(records))
    run = recipe(pictures, stages=("finetune",), num_train_epochs=1).model_dump()
    run["stages"]["finetune"]["data"] = [{"path": str(data), "images": str(pictures)}]
    Recipe = type(recipe(pictures))
    with pytest.raises(UserError, match="on_bad_sample: skip"):
        stage.run(Recipe.model_validate(run), "tiny", tmp_path / "e")
    run["stages"]["finetune"]["on_bad_sample"] = "skip"
    stage.run(Recipe.model_validate(run), "tiny", tmp_path / "s")
    kept = json.loads((tmp_path / "s" / "run.json").read_text())["stages"]["finetune"]
    assert sum(entry["count"] for entry in kept["bad_samples"].values()) == 2


def test_a_recipe_starts_from_whatever_chat_accepts(pictures: Path, tmp_path: Path) -> None:
    """The model of the package, a stage or a run. The files of its parts are linked, wherever it was found."""
    checkpoint.save(build_tiny(), tmp_path / "run" / "finetune" / "final")
    (tmp_path / "run" / "run.json").write_text('{"stages": {"finetune": {}}}')
    for path in ("nano", tmp_path / "run", tmp_path / "run" / "finetune"):
        vlm, files = start_stage(recipe(pictures, model={"checkpoint": str(path)}), None)
        assert vlm.model.num_parameters() > 0 and all(file.is_file() for part in files.values() for file in part)
    assert files["llm"] == [tmp_path / "run" / "finetune" / "final" / "language_model.safetensors"]
