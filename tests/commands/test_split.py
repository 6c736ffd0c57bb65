"""The parts of a split checkpoint are ordinary parts: their own classes load them, and a recipe can use them again."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import CLIP, DINOV2, LLAMA, PHI, SIGLIP, tiny_model
from tests.tiny_vlm import build_moved_vlm, build_tiny
from tinyllava.commands.split import write_split

GEMMA2 = {**LLAMA, "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 2.0}
MOF = {"model_type": "mof", "first": CLIP, "second": DINOV2}


@pytest.mark.parametrize(
    "parts",
    [{}, {"llm": PHI, "tower": SIGLIP}, {"llm": GEMMA2, "tower": DINOV2, "connector": "linear"}],
    ids=["llama-clip", "phi-siglip", "gemma2-dinov2"],
)
@torch.no_grad()
def test_parts_load_alone_and_give_the_same_model_together(parts: dict, tmp_path: Path, pictures: Path) -> None:
    vlm = build_moved_vlm(**parts)
    model, processor = vlm.model, vlm.processor
    write_split(vlm, tmp_path)
    image = Image.open(pictures / "3.png").convert("RGB")
    inputs = processor(images=image, text="USER: <image>\nWhat is it? ASSISTANT:", return_tensors="pt")
    text = inputs["input_ids"][inputs["input_ids"] != model.config.image_token_id][None]

    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    assert torch.equal(llm(text).logits, model(input_ids=text).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    assert tokenizer.chat_template == processor.chat_template
    assert tokenizer("a cat").input_ids == processor.tokenizer("a cat").input_ids

    tower = AutoModel.from_pretrained(tmp_path / "vision_tower").eval()
    images = AutoImageProcessor.from_pretrained(tmp_path / "vision_tower", backend="pil")
    pixels = images(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, inputs["pixel_values"])
    expected = model.model.vision_tower(pixels).last_hidden_state
    assert torch.equal(tower(pixels).last_hidden_state, expected)
    assert json.loads((tmp_path / "vision_tower" / "config.json").read_text())["vision_feature_layer"] == -2

    spec = tiny_model(connector=parts.get("connector", "mlp2x_gelu"))
    spec |= {"llm": str(tmp_path / "llm"), "vision_tower": str(tmp_path / "vision_tower")}
    again = build_tiny(spec).model
    projector = tmp_path / "connector" / "llava.projector"
    if "connector" in parts:  # linear: llama.cpp would apply GELU between its layer and the identity layer
        assert not projector.exists()
    else:
        names = set(torch.load(projector, weights_only=True))
        assert names >= {"multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.bias"}
    again.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
    assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


def test_a_mixture_is_split_into_two_towers_without_a_projector(tmp_path: Path) -> None:
    vlm = build_moved_vlm(tower=MOF, connector="mof_mlp")
    model = vlm.model
    write_split(vlm, tmp_path)
    for name in ("first", "second"):
        tower = AutoModel.from_pretrained(tmp_path / "vision_tower" / name)
        own = getattr(model.model.vision_tower, name).state_dict()
        assert all(torch.equal(tensor, own[key]) for key, tensor in tower.state_dict().items())
    assert not (tmp_path / "connector" / "llava.projector").exists()
    facts = json.loads((tmp_path / "connector" / "config.json").read_text())
    assert "mof_mlp" in facts["connector"] and facts["vision_dim"] == model.config.vision_config.hidden_size
