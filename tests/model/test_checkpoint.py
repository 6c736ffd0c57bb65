"""A checkpoint is complete: it loads, here and in plain transformers, and gives the same logits; a half-written one is
refused.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.conftest import CLIP, DINOV2, LLAMA, PHI, SIGLIP, tiny_model
from tinyllava.config import ModelSpec, Tune
from tinyllava.data.sample import Sample
from tinyllava.errors import UserError
from tinyllava.model import checkpoint, weight_files
from tinyllava.model.adapter import ADAPTER, merge
from tinyllava.model.build import build
from tinyllava.train.tune import apply_tuning

SAMPLE = {
    "id": "a",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
}
UNTIED = {**LLAMA, "tie_word_embeddings": False}
LORA = {"llm": {"lora": {"r": 4, "alpha": 8}}, "vision_tower": {"lora": {"r": 2, "alpha": 2}}, "connector": "full"}


def made(tune: dict | None = None, **parts):
    """A tiny model whose every weight has been moved, adapters included, as if it had been trained."""
    model, processor, template = build(
        ModelSpec.model_validate(tiny_model(**parts)), lambda: [Sample.from_llava(SAMPLE)]
    )
    if tune:
        apply_tuning(model, Tune.model_validate(tune), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), processor, template


def logits(model, processor, folder: Path) -> torch.Tensor:
    image = Image.open(folder / "3.png").convert("RGB")
    inputs = processor(images=image, text="USER: <image>\nWhat is it? ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


PLAIN = [
    ({}, None),
    ({"tower": SIGLIP}, None),
    ({"tower": DINOV2}, None),
    ({"llm": UNTIED}, None),
    ({"connector": "linear"}, None),
    ({"connector": "identity", "tower": {**CLIP, "hidden_size": 32}}, None),
    ({}, LORA),
    ({"connector": "linear"}, LORA),
]
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}  # ties its head to `wte`
OURS = [
    ({"llm": GPT2}, None),
    ({"llm": PHI}, None),
    ({"connector": {"mlp": {"layers": 3, "act": "silu"}}}, None),
    ({"llm": PHI, "tower": SIGLIP}, LORA),
    ({"connector": "mlp3x_gelu"}, LORA),
]


@pytest.mark.parametrize("parts,tune", [*PLAIN, *OURS])
def test_what_is_saved_is_what_is_loaded(parts: dict, tune: dict | None, pictures: Path, tmp_path: Path) -> None:
    model, processor, template = made(tune, **parts)
    checkpoint.save(model, processor, template, tmp_path / "c")
    loaded, same_processor, same_template, record = checkpoint.load(tmp_path / "c")
    torch.testing.assert_close(
        logits(loaded, same_processor, pictures), logits(model, processor, pictures), rtol=0, atol=0
    )
    assert (same_template.name, same_template.source) == (template.name, template.source)
    assert record["plain"] == ((parts, tune) in PLAIN)
    assert loaded.generation_config.suppress_tokens == [model.config.image_token_id]


@pytest.mark.parametrize("parts,tune", PLAIN)
def test_a_plain_checkpoint_is_transformers_own(parts: dict, tune: dict | None, pictures: Path, tmp_path: Path) -> None:
    model, processor, template = made(tune, **parts)
    checkpoint.save(model, processor, template, tmp_path / "c")
    theirs, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert type(theirs).__module__ == "transformers.models.llava.modeling_llava"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    own_processor = AutoProcessor.from_pretrained(tmp_path / "c")
    assert type(own_processor).__name__ == "LlavaProcessor"
    ours = logits(model, processor, pictures)
    torch.testing.assert_close(logits(theirs.eval(), own_processor, pictures), ours, rtol=0, atol=0)


def test_the_keys_are_the_published_ones(tmp_path: Path) -> None:
    """The layout of llava-hf/llava-1.5-7b-hf, which vLLM and transformers 5.20 to 5.23 read."""
    model, processor, template = made(llm=UNTIED)
    checkpoint.save(model, processor, template, tmp_path)
    keys = set(json.loads((tmp_path / weight_files.INDEX).read_text())["weight_map"])
    layer = "vision_tower.vision_model.encoder.layers.0"
    golden = {
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
        f"{layer}.self_attn.q_proj.weight",
        f"{layer}.layer_norm1.bias",
        f"{layer}.mlp.fc1.weight",
        "vision_tower.vision_model.post_layernorm.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_1.bias",
        "multi_modal_projector.linear_2.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.0.mlp.gate_proj.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    }
    assert golden <= keys
    prefixes = (
        "vision_tower.vision_model.",
        "multi_modal_projector.linear_",
        "language_model.model.",
        "language_model.lm_head.",
    )
    assert all(key.startswith(prefixes) for key in keys)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llava" and config["text_config"]["architectures"] == ["LlamaForCausalLM"]


def test_an_adapter_merges_into_the_same_logits(pictures: Path, tmp_path: Path) -> None:
    model, processor, template = made(LORA)
    before = logits(model, processor, pictures)
    merged = merge(model)
    torch.testing.assert_close(logits(merged, processor, pictures), before, atol=1e-4, rtol=1e-4)
    checkpoint.save(merged, processor, template, tmp_path / "m")
    assert not (tmp_path / "m" / ADAPTER).exists()
    again, *_ = checkpoint.load(tmp_path / "m")
    torch.testing.assert_close(logits(again, processor, pictures), before, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="no adapter to merge"):
        merge(again)


def test_an_adapter_carries_its_connector(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, processor, template = made(LORA)
    checkpoint.save(model, processor, template, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["multi_modal_projector"]
    stored = load_file(tmp_path / ADAPTER)["base_model.model.model.multi_modal_projector.linear_1.weight"]
    torch.testing.assert_close(stored, model.model.multi_modal_projector.linear_1.weight.data)


@pytest.mark.parametrize("tune", [None, LORA], ids=["full", "lora"])
def test_restoring_puts_every_weight_back(tune: dict | None, pictures: Path, tmp_path: Path) -> None:
    model, processor, template = made(tune)
    before = logits(model, processor, pictures)
    checkpoint.save(model, processor, template, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    checkpoint.restore(model, tmp_path)
    torch.testing.assert_close(logits(model, processor, pictures), before, rtol=0, atol=0)


def test_files_of_parts_that_did_not_change_are_linked(tmp_path: Path) -> None:
    model, processor, template = made()
    files = checkpoint.save(model, processor, template, tmp_path / "a")
    checkpoint.save(model, processor, template, tmp_path / "b", reuse={"llm": files["llm"]})
    for name, linked in (("language_model.safetensors", True), ("connector.safetensors", False)):
        assert (tmp_path / "a" / name).samefile(tmp_path / "b" / name) == linked
    shutil.rmtree(tmp_path / "a")
    checkpoint.load(tmp_path / "b")


@pytest.mark.parametrize("damage", ["tinyllava.json", "connector.safetensors", "truncate", "config.json"])
def test_a_half_written_checkpoint_is_refused(damage: str, tmp_path: Path) -> None:
    model, processor, template = made()
    checkpoint.save(model, processor, template, tmp_path)
    if damage == "truncate":
        whole = (tmp_path / "language_model.safetensors").read_bytes()
        (tmp_path / "language_model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif damage == "tinyllava.json":  # killed before the record was written, and before the index
        (tmp_path / damage).unlink()
        (tmp_path / weight_files.INDEX).unlink()
    else:
        (tmp_path / damage).unlink()
    with pytest.raises(UserError, match=r"half written|damaged|no checkpoint") as error:
        checkpoint.load(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_full_disk_costs_nothing_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, template = made()
    with checkpoint.aside(tmp_path / "c") as directory:
        checkpoint.save(model, processor, template, directory)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weight_files, "save_file", full)
    with pytest.raises(UserError, match="disk full"), checkpoint.aside(tmp_path / "c") as directory:
        checkpoint.save(model, processor, template, directory)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    checkpoint.load(tmp_path / "c")
