"""The best weights are kept and end in final/, a stage can stop early, and labels can be smoothed."""

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.conftest import tiny_model
from tests.tiny_vlm import build_tiny
from tests.train.test_stage import load_weights, read_losses
from tests.train.tiny_run import recipe
from tinyllava.config.schema import EarlyStopping
from tinyllava.train import stage
from tinyllava.train.record import RunRecord
from tinyllava.train.trainer import Trainer

LORA = {"llm": {"lora": {"r": 4, "alpha": 8}}}
FULL = {"llm": "full"}


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The validation losses by step, which a test sets; 9 at all other steps."""
    losses: dict[int, float] = {}

    def evaluate(self: Trainer, *args: object, **kwargs: object) -> dict[str, float]:
        metrics = {"eval_loss": losses.get(self.state.global_step, 9.0)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    return losses


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the next run after a step, as Ctrl-C does."""

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    original = Trainer.__init__
    monkeypatch.setattr(
        Trainer, "__init__", lambda self, callbacks, **kw: original(self, callbacks=[*callbacks, Interrupt()], **kw)
    )


def run(pictures: Path, output: Path, tune: dict, early_stopping: dict | None = None, **trainer: object) -> Path:
    """Train the second stage; returns its directory."""
    made = recipe(pictures, tune, stages=("finetune",), **{"eval_steps": 1, **trainer})
    made.stages["finetune"].early_stopping = EarlyStopping(**early_stopping) if early_stopping else None
    return stage.run(made, "tiny", output).parent


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load_weights(one), load_weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("tune", "options"),
    [
        (FULL, {"save_total_limit": 1}),
        (LORA, {"save_total_limit": 1, "save_strategy": "best"}),
        (LORA, {"save_steps": 2, "save_only_model": True}),  # no multiple of the best step
    ],
    ids=["full", "lora-best", "lora-between-saves"],
)
def test_final_holds_the_best_weights(
    tune: dict, options: dict, pictures: Path, tmp_path: Path, validate: dict[int, float]
) -> None:
    validate |= {2: 3.0, 3: 1.0, 4: 2.0}
    directory = run(pictures, tmp_path, tune, max_steps=4, load_best_model_at_end=True, **options)
    final, best = directory / "final", directory / "checkpoint-3"
    assert_same_weights(final, best)
    assert json.loads((final / "tinyllava.json").read_text())["run"]["step"] == 3
    if options.get("save_strategy") != "best":
        with pytest.raises(AssertionError):
            assert_same_weights(directory / "checkpoint-4", best)
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best) and state["best_metric"] == 1.0


def test_a_resumed_run_remembers_the_best_and_its_patience(
    pictures: Path, tmp_path: Path, validate: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    validate |= {2: 1.0, 3: 2.0, 4: 1.5, 5: 1.2, 6: 0.5}
    options = {"early_stopping": {"patience": 3}, "max_steps": 8, "save_steps": 4, "save_total_limit": 1}
    options["eval_on_start"] = True  # only of the first start
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(4, patch)
        run(pictures, tmp_path, FULL, **options)
    directory = run(pictures, tmp_path, FULL, **options)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 1, 2, 3, 4, 5]
    assert max(read_losses(tmp_path)) == 5  # two failures before the interruption, the third at step 5
    assert_same_weights(directory / "final", directory / "checkpoint-2")


def test_a_threshold_is_the_smallest_improvement_that_counts(
    pictures: Path, tmp_path: Path, validate: dict[int, float]
) -> None:
    validate |= {1: 3.0, 2: 2.0, 3: 1.99, 4: 1.98}
    run(pictures, tmp_path, FULL, {"patience": 2, "threshold": 0.1}, max_steps=8, load_best_model_at_end=False)
    assert max(read_losses(tmp_path)) == 4
    assert not list((tmp_path / "finetune").glob("checkpoint-3"))  # the best is kept only if asked


# -- label smoothing ---------------------------------------------------------------------------------------------------


def smooth_by_hand(logits: torch.Tensor, labels: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Summed over supervised tokens: (1 - e) times -log p of the next token, and e times its mean over all."""
    nll = -logits[:, :-1].float().log_softmax(-1)[labels[:, 1:] != -100]
    targets = labels[:, 1:][labels[:, 1:] != -100]
    return ((1 - epsilon) * nll.gather(1, targets[:, None])[:, 0] + epsilon * nll.mean(-1)).sum()


def test_smoothing_is_a_mean_over_the_supervised_tokens_of_the_global_batch(pictures: Path, tmp_path: Path) -> None:
    """Micro-batches of 8 and 2 samples, and a validation loss without smoothing."""
    logged = []
    for micro in (8, 2):
        options = {"per_device_train_batch_size": micro, "label_smoothing_factor": 0.1, "eval_on_start": True}
        run(pictures, tmp_path / str(micro), FULL, max_steps=1, save_strategy="no", **options)
        text = (tmp_path / str(micro) / "finetune" / "metrics.jsonl").read_text()
        lines = {key: value for line in text.splitlines()[::-1] for key, value in json.loads(line).items()}
        logged.append((lines["loss"], lines["eval_loss"]))
    made = recipe(pictures, FULL, stages=("finetune",))
    setup = stage.prepare_stage(made, "finetune", output=tmp_path)
    trainer = stage.make_trainer(setup, "finetune", tmp_path, RunRecord(tmp_path, made, "tiny"))
    samples = trainer.get_train_dataloader().batch_sampler.plan.shuffle(0)[:8]
    total = tokens = plain = 0
    setup.vlm.model.eval()
    for index in samples:
        batch = trainer.data_collator([setup.dataset[int(index)]])
        labels = batch.pop("labels")
        batch.pop("index")
        with torch.no_grad():
            logits = setup.vlm.model(**batch).logits
        total += smooth_by_hand(logits, labels, 0.1)
        plain += smooth_by_hand(logits, labels, 0.0)
        tokens += int((labels[:, 1:] != -100).sum())
    assert abs(total - plain) / tokens > 1e-4
    for loss, _ in logged:
        assert loss == pytest.approx(float(total / tokens), rel=1e-5)
    assert logged[0][1] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_smoothing_leaves_out_tokens_that_cannot_be_answered() -> None:
    """Rows beyond `head_rows` have probability 0: a mean over them would be infinite."""
    model = build_tiny(tiny_model()).model
    model.config.head_rows = 300
    ids = torch.arange(8)[None]
    loss = model(input_ids=ids, labels=ids, label_smoothing=0.1).loss
    model.config.head_rows = None
    logits = model(input_ids=ids).logits[..., :300]
    torch.testing.assert_close(loss, smooth_by_hand(logits, ids, 0.1) / 7)
