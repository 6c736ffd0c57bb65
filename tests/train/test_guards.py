"""Guards while training: what is trained gets a gradient, what is frozen stays, spikes and damage are named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import tiny_model
from tests.train.tiny_run import recipe
from tinyllava.config import Recipe
from tinyllava.errors import UserError
from tinyllava.guards import gradients as guards
from tinyllava.guards.losses import LossGuard
from tinyllava.train import stage
from tinyllava.train.record import RunRecord

HERE = "tests.train.test_guards"


class Whole(nn.Module):
    """A connector that is right. The others differ from it in one fault each."""

    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(vision_dim, text_dim), nn.Linear(text_dim, text_dim)
        self.extra = nn.Parameter(torch.zeros(()))
        self.experts = nn.ModuleList(nn.Linear(text_dim, text_dim) for _ in range(2))
        self.register_buffer("seen", torch.zeros(()))

    def num_tokens(self, patches: int) -> int:
        return patches

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The second expert gets no token."""
        return self.last(self.experts[0](self.first(features)).relu()) + self.extra


class Detached(Whole):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features).detach()


class HalfDetached(Whole):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.first(features)
        return self.last(self.experts[0](features)) + self.extra


class Unused(Whole):
    """Never adds its parameter of one number."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.last(self.experts[0](self.first(features)))


class Dead(Whole):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return 0.0 * super().forward(features)


class Gated(Whole):
    """Begins as zero: the tower gets its first gradient after the gate has opened."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.extra * self.last(self.experts[0](self.first(features)))


class Counting(Whole):
    """Writes into its buffer at every call."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return super().forward(features)


class Drifting(Whole):
    """Writes into its weights later in the training."""

    calls = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        Drifting.calls += 1
        if Drifting.calls > 3:
            self.last.weight.data[0, 0] += 1e-7
        return super().forward(features)


class Normed(Whole):
    """Its BatchNorm keeps statistics."""

    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__(vision_dim, text_dim)
        self.norm = nn.BatchNorm1d(text_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(features).mT).mT


def train(pictures: Path, output: Path, connector: str, tune: dict, **trainer: object) -> Path:
    trainer = {"num_train_epochs": 1, "save_strategy": "no", **trainer}
    model = tiny_model(connector=f"{HERE}:{connector}")
    run = recipe(pictures, tune, model, ("finetune",), **trainer)
    run.stages["finetune"].validation = None
    return stage.run(run, "tiny", output)


FULL = {"connector": "full", "llm": "full"}
PRETRAIN = {"connector": "full"}


@pytest.mark.parametrize(
    "connector,tune,message",
    [
        (
            "Detached",
            PRETRAIN,
            r"the connector is trained, but has no gradient at step 1: .*first.weight.* and \d+ more",
        ),
        ("Detached", FULL, "the connector is trained, but has no gradient at step 1"),
        ("HalfDetached", FULL, r"no gradient at step 1: \S*first.bias, \S*first.weight\. "),
        ("Unused", FULL, r"no gradient at step 1: \S*projector.extra\. .*connector: frozen"),
        (
            "Dead",
            {**FULL, "vision_tower": "full"},
            "the vision tower is trained, but has a gradient of exactly zero in 3",
        ),
        (
            "Counting",
            {**FULL, "connector": "frozen"},
            r"connector has frozen weights that changed: \S*projector.seen\.",
        ),
        ("Drifting", {**FULL, "connector": "frozen"}, r"frozen weights that changed: \S*projector.last.weight\."),
    ],
)
def test_a_part_that_does_not_do_what_its_tuning_says_stops_the_run(
    connector: str, tune: dict, message: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "ZERO_STEPS", 3)
    with pytest.raises(UserError, match=message):
        train(pictures, tmp_path, connector, tune)
    assert not (tmp_path / "finetune" / "final").exists()


@pytest.mark.parametrize(
    "connector,tune",
    [
        ("Whole", FULL),
        ("Gated", {"vision_tower": "full", "connector": "full"}),
        ("Normed", {"connector": "frozen", "llm": "full"}),
        ("Normed", FULL),
        ("Counting", FULL),
    ],
)
def test_what_is_legitimate_trains(connector: str, tune: dict, pictures: Path, tmp_path: Path) -> None:
    """An expert without tokens, a gate that starts at zero with a warm-up, buffers of a trained part, BatchNorm."""
    assert train(pictures, tmp_path, connector, tune, warmup_steps=2, max_steps=6).is_dir()


def test_text_without_images_cannot_train_a_connector(pictures: Path, tmp_path: Path) -> None:
    records = [each for each in json.loads((pictures / "instructions.json").read_text()) if "image" not in each]
    (tmp_path / "text.json").write_text(json.dumps(4 * records))
    run = recipe(pictures, FULL, stages=("finetune",)).model_dump()
    run["stages"]["finetune"] |= {"data": [{"path": str(tmp_path / "text.json")}], "validation": None}
    with pytest.raises(UserError, match=r"no sample has an image, so the connector would .*connector: frozen"):
        stage.run(Recipe.model_validate(run), "tiny", tmp_path / "run")
    run["stages"]["finetune"]["data"][0]["streaming"] = True  # known only when the stream was read
    run["stages"]["finetune"]["trainer"] |= {"max_steps": 2}
    with pytest.raises(
        UserError, match="the connector is trained, but has no gradient, because no sample had an image"
    ):
        stage.run(Recipe.model_validate(run), "tiny", tmp_path / "stream")
    run["stages"]["finetune"]["tune"]["connector"] = "frozen"
    assert stage.run(Recipe.model_validate(run), "tiny", tmp_path / "frozen").is_dir()


def test_the_connector_is_judged_by_the_first_step_with_an_image(pictures: Path, tmp_path: Path) -> None:
    run = recipe(pictures, FULL, stages=("finetune",), num_train_epochs=1, save_strategy="no")
    run.stages["finetune"].validation = None
    setup = stage.prepare_stage(run, "finetune", output=tmp_path)
    has_image = np.array([name.startswith("i") for name in setup.dataset.ids])
    order = np.concatenate([np.repeat(np.flatnonzero(~has_image), 6), np.flatnonzero(has_image)])[:48].tolist()
    trainer = stage.make_trainer(setup, "finetune", tmp_path, RunRecord(tmp_path, run, "tiny"), order=order)
    hooks = []
    guard, check = trainer.part_guard, trainer.part_guard.on_pre_optimizer_step

    def check_and_count(*args: object, **kwargs: object) -> None:
        check(*args, **kwargs)
        hooks.append(len(guard.hooks))

    guard.on_pre_optimizer_step = check_and_count
    trainer.train()
    assert hooks == [hooks[0], hooks[0], hooks[0], 0, 0, 0] and hooks[0] > 0


# -- losses ------------------------------------------------------------------------------------------------------------


class Named:
    """A dataset that has only ids."""

    def __init__(self) -> None:
        self.ids = [f"s{number}" for number in range(1000)]


class Lines(list):
    """In the place of a RunLog."""

    def add_line(self, state: object, values: dict) -> None:
        self.append(values)


def watch(losses: list[float]) -> list[dict]:
    """The spikes in these losses, of two micro-batches each: the second has the larger part."""
    lines = Lines()
    guard = LossGuard(Named(), nn.Linear(1, 1), lines.add_line, False)
    for step, loss in enumerate(losses, 1):
        guard.add(step, torch.tensor(0.25 * loss), [step])
        guard.add(step, torch.tensor(0.75 * loss), [step + 500])
        if step % 7 == 0:
            guard.check(None)
    guard.check(None)
    return lines


def test_a_spike_is_reported_with_its_samples(caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 300)
    losses = 2.0 + 3.0 * np.exp(-np.arange(300) / 30) + noise  # it falls, as at the beginning of a training
    assert not watch(losses.tolist())
    losses[150] += 3.0
    (line,) = watch(losses.tolist())
    assert line["step"] == 151 and line["samples"] == "s651, s151" and line["usual_loss"] == pytest.approx(2.1, abs=0.1)
    assert len(watch([0.001] * 50 + [0.4] + [0.001] * 50 + [0.6])) == 1  # near zero everything is far from the median
    assert len(watch([1.0] * 30 + [5.0] * 20)) == 20 and len(watch([1.0] * 60 + [5.0] * 200)) < 70  # a new level


def test_a_nan_names_the_samples_of_its_micro_batch() -> None:
    guard = LossGuard(Named(), nn.Linear(1, 1), Lines().add_line, True)
    for samples, loss in (([1, 2], 0.5), ([3, 4], float("nan")), ([5, 6], 9.0)):
        guard.add(4, torch.tensor(loss), samples)
    with pytest.raises(
        UserError, match=r"loss of step 4 is nan \(samples s3, s4, s5, s6, s1, s2\).* bf16 instead of fp16"
    ):
        guard.check(None)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_no_checkpoint_is_written_after_a_nan(
    where: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are read when they are logged, here never: a save must look by itself."""
    run = recipe(pictures, FULL, stages=("finetune",), logging_steps=1000, save_steps=3, eval_strategy="no")
    run.stages["finetune"].validation = None
    setup = stage.prepare_stage(run, "finetune", output=tmp_path)
    trainer = stage.make_trainer(setup, "finetune", tmp_path, RunRecord(tmp_path, run, "tiny"))
    monkeypatch.setattr(
        trainer.losses, "check", lambda state, check=trainer.losses.check: trainer.control.should_save and check(state)
    )
    original = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        loss = original(model, inputs, *args, **kwargs)
        if trainer.state.global_step == 5 and where == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss * float("nan") if trainer.state.global_step == 4 and where == "loss" else loss

    trainer.compute_loss = compute_loss
    with pytest.raises(
        UserError, match=r"loss of step 5 is nan" if where == "loss" else r"weights of the \w+ are not numbers"
    ):
        trainer.train()
    assert [path.name for path in (tmp_path).glob("checkpoint-*")] == ["checkpoint-3"]


# -- damaged images ----------------------------------------------------------------------------------------------------


def damage(folder: Path, pictures: Path, bad: range) -> dict:
    """A recipe over captions of which these have a damaged image. Steps are 4 samples, in the order of the file."""
    records = json.loads((pictures / "captions.json").read_text())
    for number, record in enumerate(records):
        image = (pictures / record["image"]).read_bytes()
        (folder / record["image"]).write_bytes(image[: len(image) // 2] if number in bad else image)
    (folder / "captions.json").write_text(json.dumps(records))
    run = recipe(pictures, FULL, stages=("finetune",), num_train_epochs=1, per_device_train_batch_size=2).model_dump()
    run["stages"]["finetune"] |= {"data": [{"path": str(folder / "captions.json")}], "validation": None}
    run["stages"]["finetune"] |= {"on_bad_sample": "skip", "global_batch_size": 4}
    return run


def test_a_step_of_damaged_images_is_skipped(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two micro-batches a step. Steps 2 and 3 have no image, step 5 has one micro-batch of two."""
    run = Recipe.model_validate(damage(tmp_path, pictures, range(4, 12)))
    setup = stage.prepare_stage(run, "finetune", output=tmp_path / "s")
    trainer = stage.make_trainer(setup, "finetune", tmp_path / "s", RunRecord(tmp_path, run, "tiny"), list(range(24)))
    weights = {}

    def keep(args, state, control, model, **kwargs):
        weights[state.global_step] = [weight.detach().clone() for weight in model.parameters()]

    trainer.part_guard.on_step_end = keep
    trainer.train()
    steps = {1: True, 2: False, 3: False, 4: True, 5: True, 6: True}
    for step in range(2, 7):
        same = all(torch.equal(old, new) for old, new in zip(weights[step - 1], weights[step], strict=True))
        assert same != steps[step], step
    assert trainer.losses.skipped_steps == [2, 3] and trainer.state.global_step == 6
    assert trainer.lr_scheduler.last_epoch == 6 and len(trainer.skipped) == 8
    lines = [json.loads(line) for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses[2] is None and losses[3] is None and losses[4] > 1


def test_a_stage_whose_steps_are_all_skipped_fails(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all 6 steps were skipped: no image .*tinyllava data check"):
        stage.run(Recipe.model_validate(damage(tmp_path, pictures, range(24))), "tiny", tmp_path / "run")
