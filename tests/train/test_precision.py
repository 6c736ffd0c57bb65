"""What is trained is stored in fp32, whatever the stored precision of the model, unless half precision is asked for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import tiny_model
from tests.tiny_vlm import build_tiny
from tests.train.test_stage import read_losses
from tests.train.tiny_run import recipe
from tinyllava import checkpoint
from tinyllava.data.collate import Collator
from tinyllava.errors import UserError
from tinyllava.model.modules import find_part
from tinyllava.train import stage
from tinyllava.train.record import RunRecord

LORA = {"lora": {"r": 4, "alpha": 8}}
DORA = {"lora": {"r": 4, "alpha": 8, "use_dora": True}}
TUNES = [
    {"llm": "full"},
    {"llm": "frozen"},
    {"llm": LORA},
    {"llm": DORA, "vision_tower": DORA},
    {"llm": {"partial": {"last": 1}}},
    {"llm": {"embeddings": {}}},
    {"llm": LORA, "connector": LORA},
    {"llm": "frozen", "connector": "frozen", "vision_tower": {"partial": {"last": 1}}},
]


@pytest.fixture(scope="module")
def stored(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, stored in each half precision."""
    folders = {}
    for name in ("float16", "bfloat16"):
        vlm = build_tiny(tiny_model())
        vlm.model.to(getattr(torch, name))
        vlm.model.config.dtype, vlm.model.config.new_tokens = vlm.model.dtype, [5, 6]
        folders[name] = tmp_path_factory.mktemp(name)
        checkpoint.save(vlm, folders[name])
    return folders


def prepare(pictures: Path, output: Path, model: dict, tune: dict, **trainer: object) -> stage.StageSetup:
    return stage.prepare_stage(recipe(pictures, tune, model, ("finetune",), **trainer), "finetune", output=output)


@pytest.mark.parametrize("tune", TUNES, ids=str)
@pytest.mark.parametrize(("dtype", "bf16"), [("float16", False), ("float16", True), ("bfloat16", False)])
def test_trained_weights_are_in_fp32_and_everything_still_computes(
    dtype: str, tune: dict, bf16: bool, stored: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    setup = prepare(pictures, tmp_path, {"checkpoint": str(stored[dtype])}, tune, bf16=bf16)
    model = setup.vlm.model.train()
    parameters = dict(model.named_parameters())
    trained = {name for name, weight in parameters.items() if weight.requires_grad}
    assert trained and all(parameters[name].dtype == torch.float32 for name in trained)
    frozen = {find_part(name) for name in parameters} - {find_part(name) for name in trained}
    for name, weight in parameters.items():
        if find_part(name) in frozen and dtype == "bfloat16":
            assert weight.dtype == torch.bfloat16, name  # a large frozen part takes no more memory than on disk
    for indices in (range(4), [i for i in range(len(setup.dataset)) if setup.dataset[i]["pixel_values"] is None][:2]):
        batch = Collator(setup.vlm.tokenizer.pad_token_id)([setup.dataset[index] for index in indices])
        batch.pop("index")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        assert torch.isfinite(loss) and all(torch.isfinite(parameters[name].grad).all() for name in trained)
    rows = {row.part: row.dtype for row in setup.parts}
    assert all("float32" in rows[find_part(name)] for name in trained)  # the table shows what is trained


def test_half_precision_stays_when_it_is_asked_for_by_name(
    pictures: Path, tmp_path: Path, stored: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = {"checkpoint": str(stored["float16"]), "dtype": "bfloat16"}
    setup = prepare(pictures, tmp_path, model, {"llm": "full"})
    assert {weight.dtype for weight in setup.vlm.model.parameters()} == {torch.bfloat16}
    assert "half precision" in caplog.text and {row.dtype for row in setup.parts} == {"bfloat16"}
    mixed = prepare(pictures, tmp_path, model, {"llm": "full"}, bf16=True)
    assert mixed.vlm.model.lm_head.weight.dtype == torch.float32


def test_a_checkpoint_holds_trained_weights_in_fp32_and_frozen_ones_as_they_were(
    pictures: Path, tmp_path: Path, stored: dict[str, Path]
) -> None:
    made = recipe(pictures, {"llm": LORA}, {"checkpoint": str(stored["float16"])}, ("finetune",), max_steps=2)
    setup = stage.prepare_stage(made, "finetune", output=tmp_path)
    setup.start_files.clear()  # as for parts from the Hub: the frozen weights are written, not linked
    trainer = stage.make_trainer(setup, "finetune", tmp_path, RunRecord(tmp_path, made, "tiny"))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]
    files = tmp_path / "checkpoint-2"
    dtypes = {
        name: {tensor.dtype for tensor in load_file(files / f"{name}.safetensors").values()}
        for name in ("vision_tower", "connector", "language_model", "adapter_model")
    }
    half, single = {torch.float16}, {torch.float32}
    assert dtypes == {"vision_tower": half, "connector": single, "language_model": half, "adapter_model": single}
    before = {name: weight.clone() for name, weight in setup.vlm.model.named_parameters()}
    with torch.no_grad():
        for weight in setup.vlm.model.parameters():
            weight.zero_()
    checkpoint.restore(setup.vlm.model, files)  # a resumed run has exactly these weights
    for name, weight in setup.vlm.model.named_parameters():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("dtype", "words", "missing"),
    [("auto", ["learning rate"], "bf16"), ("float16", ["remove `model.dtype: float16`"], "bf16")],
)
def test_the_error_for_a_nan_advises_only_what_can_help(
    dtype: str, words: list[str], missing: str, pictures: Path, tmp_path: Path, stored: dict[str, Path]
) -> None:
    model = {"checkpoint": str(stored["float16"]), "dtype": dtype}
    made = recipe(pictures, {"llm": "full"}, model, ("finetune",))
    setup = stage.prepare_stage(made, "finetune", output=tmp_path)
    with torch.no_grad():
        setup.vlm.model.model.multi_modal_projector.linear_1.weight.fill_(float("nan"))
    trainer = stage.make_trainer(setup, "finetune", tmp_path, RunRecord(tmp_path, made, "tiny"))
    with pytest.raises(UserError) as error:
        trainer.train()
    assert all(word in str(error.value) for word in words) and missing not in str(error.value)


def test_adapters_of_a_second_stage_are_in_fp32(pictures: Path, tmp_path: Path, stored: dict[str, Path]) -> None:
    made = recipe(pictures, {"llm": LORA}, {"checkpoint": str(stored["float16"])}, max_steps=3, save_strategy="no")
    stage.run(made, "tiny", tmp_path)
    losses = read_losses(tmp_path)
    assert losses[3] < losses[1]
    adapter = load_file(tmp_path / "finetune" / "final" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    config = json.loads((tmp_path / "finetune" / "final" / "config.json").read_text())
    assert config["dtype"] == "float16"
