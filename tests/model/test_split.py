"""Parts taken out of a checkpoint are ordinary parts: their own classes load them, a recipe makes the model again."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import CLIP, DINOV2, LLAMA, PHI, SIGLIP, tiny_model
from tinyllava.config import ModelSpec
from tinyllava.data.sample import Sample
from tinyllava.model.build import build
from tinyllava.model.split import write_split

GEMMA2 = {**LLAMA, "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 2.0}
MOF = {"model_type": "mof", "first": CLIP, "second": DINOV2}
SAMPLE = Sample.from_llava(
    {
        "id": "a",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    }
)


def moved(**parts):
    """A tiny model with every weight moved away from its initialisation."""
    model, processor, template = build(ModelSpec.model_validate(tiny_model(**parts)), lambda: [SAMPLE])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), processor, template


@pytest.mark.parametrize(
    "parts",
    [{}, {"llm": PHI, "tower": SIGLIP}, {"llm": GEMMA2, "tower": DINOV2, "connector": "linear"}],
    ids=["llama-clip", "phi-siglip", "gemma2-dinov2"],
)
@torch.no_grad()
def test_parts_load_by_themselves_and_make_the_model_again(parts: dict, tmp_path: Path, pictures: Path) -> None:
    model, processor, _ = moved(**parts)
    write_split(model, processor, tmp_path)
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
    wanted = model.model.vision_tower(pixels).last_hidden_state
    assert torch.equal(tower(pixels).last_hidden_state, wanted)
    assert json.loads((tmp_path / "vision_tower" / "config.json").read_text())["vision_feature_layer"] == -2

    spec = tiny_model(connector=parts.get("connector", "mlp2x_gelu"))
    spec |= {"llm": str(tmp_path / "llm"), "vision_tower": str(tmp_path / "vision_tower")}
    again, _, _ = build(ModelSpec.model_validate(spec), lambda: [SAMPLE])
    connector = torch.load(tmp_path / "connector" / "llava.projector", weights_only=True)
    assert set(connector) >= {"multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.bias"}
    again.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
    assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


def test_a_mixture_is_two_towers_and_its_connector_no_projector(tmp_path: Path) -> None:
    model, processor, _ = moved(tower=MOF, connector="mof_mlp")
    write_split(model, processor, tmp_path)
    for name in ("first", "second"):
        tower = AutoModel.from_pretrained(tmp_path / "vision_tower" / name)
        own = getattr(model.model.vision_tower, name).state_dict()
        assert all(torch.equal(tensor, own[key]) for key, tensor in tower.state_dict().items())
    assert not (tmp_path / "connector" / "llava.projector").exists()
    facts = json.loads((tmp_path / "connector" / "config.json").read_text())
    assert "mof_mlp" in facts["connector"] and facts["vision_dim"] == model.config.vision_config.hidden_size
