"""QLoRA with the real bitsandbytes: 4 bits while it trains, the weights as they were in every checkpoint."""

import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch

from tests.conftest import CLIP, DINOV2, LLAMA, PHI, SIGLIP, tiny_model
from tests.train.tiny_run import recipe
from tinyllava import checkpoint
from tinyllava.checkpoint.adapter import has_adapter, merge_adapter
from tinyllava.config import Recipe, Tune
from tinyllava.errors import UserError
from tinyllava.train import stage
from tinyllava.train.record import RunRecord

QLORA = {"qlora": {"r": 4, "alpha": 8}, "lr": 5e-3}
TUNE = {"llm": QLORA, "vision_tower": {"qlora": {"r": 2, "alpha": 4}}}


def prepare_trainer(run: Recipe, output: Path):
    """The setup and the trainer of the stage `finetune`, adapters moved off their start."""
    setup = stage.prepare_stage(run, "finetune", output=output / "finetune")
    trainer = stage.make_trainer(setup, "finetune", output / "finetune", RunRecord(output, run, "tiny"))
    for name, parameter in setup.vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    batch = trainer.data_collator([setup.dataset[index] for index in range(4)])
    batch.pop("index")
    return setup, trainer, batch


def compute_logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("llm,tower", [(LLAMA, CLIP), (PHI, SIGLIP), (LLAMA, DINOV2)], ids=["llama", "phi", "dinov2"])
def test_the_linear_layers_of_the_blocks_are_nf4(llm: dict, tower: dict, pictures: Path, tmp_path: Path) -> None:
    run = recipe(pictures, TUNE, tiny_model(llm=llm, tower=tower), ("finetune",))
    setup, _, batch = prepare_trainer(run, tmp_path)
    packed = {n for n, m in setup.vlm.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert {name.split(".")[1] for name in packed} == {"language_model", "vision_tower"}
    assert not any(word in name for name in packed for word in ("embed", "head", "layers.2", "layer.2"))
    states = [setup.vlm.model.get_submodule(name).weight.quant_state for name in packed]
    assert all(state.quant_type == "nf4" and state.nested for state in states)
    rows = {row.part: row for row in setup.parts}
    plain = recipe(pictures, {}, tiny_model(llm=llm, tower=tower), ("finetune",))
    weights = {
        row.part: row.parameters for row in stage.prepare_stage(plain, "finetune", output=tmp_path / "plain").parts
    }
    for part in ("llm", "vision_tower"):
        assert rows[part].parameters == weights[part] + rows[part].trainable > weights[part]
    setup.vlm.model.train()
    setup.vlm.model(**batch).loss.backward()
    for name, parameter in setup.vlm.model.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradients_are_the_same_checkpointed_and_after_a_validation(pictures: Path, tmp_path: Path) -> None:
    model = tiny_model(
        llm={**LLAMA, "num_key_value_heads": 4}, tower={**CLIP, "hidden_size": 32, "intermediate_size": 64}
    )
    gradients = []
    for way in ("plain", "validated", "checkpointed"):
        setup, _, batch = prepare_trainer(recipe(pictures, TUNE, model, ("finetune",)), tmp_path / way)
        if way == "validated":
            compute_logits(setup.vlm.model, batch)
        if way == "checkpointed":
            setup.vlm.model.gradient_checkpointing_enable()
        setup.vlm.model.train()
        setup.vlm.model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in setup.vlm.model.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


@pytest.mark.parametrize("bf16", [False, True])
def test_layers_multiply_in_the_dtype_of_the_stage(bf16: bool, pictures: Path, tmp_path: Path) -> None:
    setup, _, batch = prepare_trainer(recipe(pictures, TUNE, stages=("finetune",), bf16=bf16), tmp_path)
    rounded = set()
    for module in setup.vlm.model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.register_forward_hook(
                lambda _module, _args, out: rounded.add(torch.equal(out, out.bfloat16().to(out)))
            )
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        setup.vlm.model.train()(**batch).loss.backward()
    assert rounded == {bf16}
    assert all(p.dtype == torch.float32 for p in setup.vlm.model.parameters() if p.requires_grad)


def test_a_checkpoint_holds_the_weights_as_they_were(pictures: Path, tmp_path: Path) -> None:
    """What was trained is the checkpoint with its base rounded to 4 bits, and the checkpoint merges as it is."""
    setup, trainer, batch = prepare_trainer(recipe(pictures, TUNE, stages=("finetune",)), tmp_path)
    trained = compute_logits(setup.vlm.model, batch)
    trainer.write_checkpoint(tmp_path / "saved", tmp_path / "saved")
    loaded = checkpoint.load(tmp_path / "saved").model
    plain = stage.prepare_stage(recipe(pictures, {}, stages=("finetune",)), "finetune", output=tmp_path / "f").vlm.model
    kept = {name.replace(".base_layer.", "."): tensor for name, tensor in loaded.state_dict().items()}
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(kept[name], tensor, rtol=0, atol=0)
    before = compute_logits(loaded, batch)
    torch.testing.assert_close(compute_logits(merge_adapter(loaded), batch), before, atol=1e-5, rtol=1e-4)
    rounded = checkpoint.load(tmp_path / "saved").model
    for name, module in setup.vlm.model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            rounded.get_submodule(name).weight.data.copy_(weight)
    torch.testing.assert_close(compute_logits(rounded, batch), trained, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, trained, atol=1e-3)


def test_runs_link_the_weights_and_go_on_in_a_next_stage(pictures: Path, tmp_path: Path) -> None:
    run = recipe(pictures, {"llm": QLORA}, num_train_epochs=1)
    pretrain, finetune = run.stages["pretrain"], run.stages["finetune"]
    run.stages["pretrain"] = pretrain.model_copy(update={"tune": finetune.tune})
    lora = Tune.model_validate({"llm": {"lora": {"r": 2}}})
    run.stages["more"] = finetune.model_copy(update={"tune": lora})
    final = stage.run(run, "tiny", tmp_path)
    first, second = tmp_path / "pretrain", tmp_path / "finetune"
    file = "language_model.safetensors"
    assert (first / "start" / file).samefile(first / "final" / file)
    assert (second / "checkpoint-2" / file).samefile(second / "final" / file)
    assert not (first / "final" / file).samefile(second / "final" / file)  # the first stage's adapter is merged into it
    merged = merge_adapter(checkpoint.load(first / "final").model).state_dict()
    base = checkpoint.load(second / "start").model.state_dict()
    torch.testing.assert_close(merged, base, rtol=0, atol=0)
    assert has_adapter(checkpoint.load(final).model) and not (tmp_path / "more" / "start").exists()


def test_where_it_cannot_be_it_says_so(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recipe(pictures, TUNE, stages=("finetune",))
    with pytest.raises(UserError, match=r"qlora cannot train new_tokens"):
        stage.prepare_stage(recipe(pictures, {"llm": {"qlora": {"new_tokens": True}}}), "finetune", output=tmp_path)
    with pytest.raises(UserError, match=r"the vision_tower is quantised, and FSDP cannot shard.*Use zero2"):
        stage.prepare_stage(
            recipe(pictures, TUNE, stages=("finetune",), fsdp="full_shard"), "finetune", output=tmp_path
        )
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(UserError, match=r"cannot quantise on cpu\. Supported: cuda"):
        stage.prepare_stage(run, "finetune", output=tmp_path, empty=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r'pip install "tinyllava-factory\[qlora\]"'):
        stage.prepare_stage(run, "finetune", output=tmp_path, empty=True)
