"""A checkpoint is complete: it loads, here and in plain transformers, and gives the same logits; a half-written one is
refused.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.conftest import CLIP, DINOV2, LLAMA, PHI, SIGLIP
from tests.tiny_vlm import build_moved_vlm, compute_logits
from tinyllava import checkpoint
from tinyllava.checkpoint import weight_files
from tinyllava.checkpoint.adapter import ADAPTER, merge_adapter
from tinyllava.errors import UserError

UNTIED = {**LLAMA, "tie_word_embeddings": False}
LORA = {"llm": {"lora": {"r": 4, "alpha": 8}}, "vision_tower": {"lora": {"r": 2, "alpha": 2}}, "connector": "full"}


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
    vlm = build_moved_vlm(tune, **parts)
    checkpoint.save(vlm, tmp_path / "c")
    loaded = checkpoint.load(tmp_path / "c")
    before = compute_logits(vlm.model, vlm.processor, pictures)
    torch.testing.assert_close(compute_logits(loaded.model, loaded.processor, pictures), before, rtol=0, atol=0)
    assert (loaded.template.name, loaded.template.source) == (vlm.template.name, vlm.template.source)
    assert loaded.record["plain"] == ((parts, tune) in PLAIN)
    assert loaded.model.generation_config.suppress_tokens == [vlm.model.config.image_token_id]


@pytest.mark.parametrize("parts,tune", PLAIN)
def test_a_plain_checkpoint_is_transformers_own(parts: dict, tune: dict | None, pictures: Path, tmp_path: Path) -> None:
    vlm = build_moved_vlm(tune, **parts)
    checkpoint.save(vlm, tmp_path / "c")
    theirs, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert type(theirs).__module__ == "transformers.models.llava.modeling_llava"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    own_processor = AutoProcessor.from_pretrained(tmp_path / "c")
    assert type(own_processor).__name__ == "LlavaProcessor"
    ours = compute_logits(vlm.model, vlm.processor, pictures)
    torch.testing.assert_close(compute_logits(theirs.eval(), own_processor, pictures), ours, rtol=0, atol=0)


def test_the_keys_are_the_published_ones(tmp_path: Path) -> None:
    """The layout of llava-hf/llava-1.5-7b-hf, which vLLM and transformers 5.20 to 5.23 read."""
    vlm = build_moved_vlm(llm=UNTIED)
    checkpoint.save(vlm, tmp_path)
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
    vlm = build_moved_vlm(LORA)
    before = compute_logits(vlm.model, vlm.processor, pictures)
    vlm.model = merge_adapter(vlm.model)
    torch.testing.assert_close(compute_logits(vlm.model, vlm.processor, pictures), before, atol=1e-4, rtol=1e-4)
    checkpoint.save(vlm, tmp_path / "m")
    assert not (tmp_path / "m" / ADAPTER).exists()
    again = checkpoint.load(tmp_path / "m").model
    torch.testing.assert_close(compute_logits(again, vlm.processor, pictures), before, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="no adapter to merge"):
        merge_adapter(again)


def test_an_adapter_carries_its_connector(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    vlm = build_moved_vlm(LORA)
    checkpoint.save(vlm, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["multi_modal_projector"]
    stored = load_file(tmp_path / ADAPTER)["base_model.model.model.multi_modal_projector.linear_1.weight"]
    torch.testing.assert_close(stored, vlm.model.model.multi_modal_projector.linear_1.weight.data)


@pytest.mark.parametrize("tune", [None, LORA], ids=["full", "lora"])
def test_restoring_puts_every_weight_back(tune: dict | None, pictures: Path, tmp_path: Path) -> None:
    vlm = build_moved_vlm(tune)
    before = compute_logits(vlm.model, vlm.processor, pictures)
    checkpoint.save(vlm, tmp_path)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.zero_()
    checkpoint.restore(vlm.model, tmp_path)
    torch.testing.assert_close(compute_logits(vlm.model, vlm.processor, pictures), before, rtol=0, atol=0)


def test_files_of_parts_that_did_not_change_are_linked(tmp_path: Path) -> None:
    vlm = build_moved_vlm()
    files = checkpoint.save(vlm, tmp_path / "a")
    checkpoint.save(vlm, tmp_path / "b", reuse={"llm": files["llm"]})
    for name, linked in (("language_model.safetensors", True), ("connector.safetensors", False)):
        assert (tmp_path / "a" / name).samefile(tmp_path / "b" / name) == linked
    shutil.rmtree(tmp_path / "a")
    checkpoint.load(tmp_path / "b")


@pytest.mark.parametrize("damage", ["tinyllava.json", "connector.safetensors", "truncate", "config.json"])
def test_a_half_written_checkpoint_is_refused(damage: str, tmp_path: Path) -> None:
    vlm = build_moved_vlm()
    checkpoint.save(vlm, tmp_path)
    if damage == "truncate":
        whole = (tmp_path / "language_model.safetensors").read_bytes()
        (tmp_path / "language_model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif damage == "tinyllava.json":  # killed before the record was written, and before the index
        (tmp_path / damage).unlink()
        (tmp_path / weight_files.INDEX).unlink()
    else:
        (tmp_path / damage).unlink()
    with pytest.raises(UserError, match=r"is incomplete|damaged|is not a checkpoint") as error:
        checkpoint.load(tmp_path)
    assert len(str(error.value).splitlines()) == 1
