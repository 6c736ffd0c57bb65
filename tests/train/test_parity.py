"""A recipe here trains what the original trains: its losses, gradient norms and final weights, from its own starting
point.

tests/parity/training holds three runs of the original TinyLLaVA Factory (README there): same weights, data, order,
template.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tinyllava.config import Recipe
from tinyllava.train import stage as stages
from tinyllava.train.record import RunRecord

DATA = Path(__file__).parents[1] / "parity" / "training"
TUNE = {
    "pretrain": {"llm": "frozen"},
    "finetune": {"llm": "full"},
    "lora": {"llm": {"lora": {"r": 8, "alpha": 16, "dropout": 0.0}}},
}


class Steps(TrainerCallback):
    """Keeps what every step logged."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(logs)


def recipe(stage: str, expected: dict, data: Path) -> Recipe:
    init = DATA / "init"
    parts = {
        "llm": {"name": str(init / "language_model"), "tokenizer": str(init)},
        "vision_tower": str(init / "vision_tower"),
        "connector": "mlp2x_gelu",
    }
    trainer = {
        "learning_rate": expected["hyperparameters"]["peak_learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "num_train_epochs": 1,
        "max_steps": 16,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
    }
    one = {
        "template": expected["template"],
        "data": [{"path": str(data), "images": str(DATA / "images")}],
        "tune": TUNE[stage],
        "global_batch_size": 4,
        "trainer": trainer,
    }
    return Recipe.model_validate({"model": {**parts, "template": "llama", "compat": True}, "stages": {stage: one}})


def in_memory(name: str) -> str:
    """The original's name of a tensor as ours."""
    for old, new in (
        ("connector._connector.0.", "model.multi_modal_projector.linear_1."),
        ("connector._connector.2.", "model.multi_modal_projector.linear_2."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise AssertionError(name)


def put(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[in_memory(name)].copy_(tensor)


def difference(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> float:
    """The largest difference; our vocabulary has one row more, for <image>, which the original spliced in without an
    id.
    """
    parameters = dict(model.named_parameters())
    ours = {name: parameters[in_memory(name)][: len(tensor)] for name, tensor in tensors.items()}
    return max((ours[name] - tensor).abs().max().item() for name, tensor in tensors.items())


@pytest.mark.parametrize("stage", list(TUNE))
def test_a_recipe_trains_what_the_original_trains(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path / "cache"))
    expected = json.loads((DATA / stage / "steps.json").read_text())
    records = json.loads((DATA / "data.json").read_text())
    order = [index for step in expected["steps"] for index in step["indices"]]
    used = sorted(set(order))  # pretrain's template is for one caption, so its data are the first 24 only
    data = tmp_path / "data.json"
    data.write_text(json.dumps([records[index] for index in used]))
    run = recipe(stage, expected, data)
    setup = stages.prepare_stage(run, stage, output=tmp_path)
    trained = load_file(DATA / "pretrain" / "connector_final.safetensors")
    original = torch.load(DATA / "init" / "connector" / "pytorch_model.bin", weights_only=True)
    put(
        setup.vlm.model,
        {f"connector.{name}": tensor for name, tensor in original.items()} if stage == "pretrain" else trained,
    )
    if stage == "lora":
        put(setup.vlm.model, load_file(DATA / "lora" / "lora_initial.safetensors"))
    trainer = stages.make_trainer(
        setup, stage, tmp_path, RunRecord(tmp_path, run, stage), order=[used.index(index) for index in order]
    )
    steps = Steps()
    trainer.add_callback(steps)
    trainer.train()

    assert len(steps.logs) == 16
    for ours, theirs in zip(steps.logs, expected["steps"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), theirs["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), theirs["step"]
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"], abs=1e-12), theirs["step"]
    for position, step in enumerate(expected["steps"]):
        samples = [used.index(index) for index in step["indices"]]
        assert [int(setup.dataset.supervised[i]) for i in samples] == step["supervised_tokens_per_sample"], position
        assert [int(setup.dataset.lengths[i]) for i in samples] == step["positions_per_sample"], position
    # LoRA is where the extra vocabulary row shows: 6.6e-5 in the adapter, nothing in loss, gradient norm or connector.
    finals = {"lora": ("connector_final", "lora_final"), "finetune": ("connector_final", "language_model_final")}
    for name in finals.get(stage, ("connector_final",)):
        tolerance = 1e-4 if name == "lora_final" else 5e-5
        assert difference(setup.vlm.model, load_file(DATA / stage / f"{name}.safetensors")) < tolerance, name
