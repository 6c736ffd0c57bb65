"""Any parts fit together, and what the model class adds to Llava is exact."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import CLIP, DINOV2, LLAMA, PHI, SIGLIP, tiny_model
from tests.tiny_vlm import build_tiny
from tinyllava.errors import UserError
from tinyllava.model.head import probe_head

GRANITE = {**LLAMA, "model_type": "granite", "logits_scaling": 4.0}
COHERE = {**LLAMA, "model_type": "cohere", "logit_scale": 0.25}
GEMMA2 = {**LLAMA, "model_type": "gemma2", "head_dim": 8}


@pytest.mark.parametrize(
    "config,head",
    [
        (LLAMA, {"head_bias": False, "head_scale": 1.0}),
        (PHI, {"head_bias": True, "head_scale": 1.0}),
        (GRANITE, {"head_bias": False, "head_scale": 0.25}),
        (COHERE, {"head_bias": False, "head_scale": 0.25}),
        (GEMMA2, {"head_bias": False, "head_softcap": 30.0}),
    ],
    ids=lambda value: value.get("model_type", "") if "model_type" in value else "",
)
def test_what_an_llm_does_after_its_last_hidden_state_is_found_by_comparing_logits(config: dict, head: dict) -> None:
    torch.manual_seed(0)
    fields = {**config, "vocab_size": 300}
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()
    if llm.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(llm.get_output_embeddings().bias)
    assert probe_head(llm) == head


@pytest.mark.parametrize("config", [LLAMA, PHI, GRANITE, GEMMA2], ids=lambda config: config["model_type"])
def test_the_models_text_logits_are_the_llms_own(config: dict) -> None:
    vlm = build_tiny(tiny_model(llm=config))
    model = vlm.model
    fields = {**config, "vocab_size": model.config.text_config.vocab_size}
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    llm.base_model.load_state_dict(model.model.language_model.state_dict())
    llm.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    ids = vlm.tokenizer("What is in the picture?", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, llm(ids).logits)


@pytest.mark.parametrize("tower", [CLIP, SIGLIP, DINOV2], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("layer", [-1, -2, 1, [-2, -1]], ids=str)
def test_stopping_at_the_layer_that_is_used_changes_nothing(tower: dict, layer: int | list[int]) -> None:
    spec = tiny_model(tower=tower)
    spec["vision_tower"]["feature_layer"] = layer
    model = build_tiny(spec).model
    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    first = model.config.prefix_tokens
    wanted = torch.cat([states[i][:, first:] for i in ([layer] if isinstance(layer, int) else layer)], dim=-1)
    assert wanted.shape[1] == model.config.num_patches
    model.requires_grad_(False)
    torch.testing.assert_close(model.model.compute_tower_features(pixels), wanted, rtol=0, atol=0)
    model.requires_grad_(True)
    torch.testing.assert_close(model.model.compute_tower_features(pixels), wanted, rtol=0, atol=0)


def test_a_frozen_tower_does_not_run_the_layers_above() -> None:
    model = build_tiny().model
    ran = []
    for number, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    model.requires_grad_(False)
    model.model.compute_tower_features(torch.zeros(1, 3, 32, 32))
    assert ran == [0, 1]


def test_uint8_pixels_are_normalised_as_the_processor_does(pictures) -> None:
    from PIL import Image

    vlm = build_tiny(tiny_model(tower=SIGLIP))
    model, processor = vlm.model, vlm.processor
    images = [Image.open(pictures / f"{number}.png") for number in range(2)]
    normal = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(
            model.model.compute_tower_features(processor.to_pixels(images)),
            model.model.compute_tower_features(normal),
            atol=1e-5,
            rtol=1e-5,
        )


def test_the_seed_covers_the_connector_whatever_the_other_parts_drew() -> None:
    clip, siglip = (
        build_tiny(tiny_model(tower=tower)).model.model.multi_modal_projector.parameters() for tower in (CLIP, SIGLIP)
    )
    for ours, theirs in zip(clip, siglip, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_supervised_loss_is_the_plain_cross_entropy(monkeypatch) -> None:
    from tinyllava.model import modeling

    model = build_tiny().model
    torch.manual_seed(0)
    hidden = torch.randn(3, 9, 32, requires_grad=True)
    labels = torch.randint(0, 300, (3, 9))
    labels[:, :4] = -100
    plain = torch.nn.functional.cross_entropy(
        model.lm_head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    (wanted,) = torch.autograd.grad(plain, hidden)
    for chunk in (4096, 4):  # whole, and in several chunks that are recomputed
        monkeypatch.setattr(modeling, "LOSS_CHUNK", chunk)
        loss = model.compute_supervised_loss(hidden, labels)
        torch.testing.assert_close(loss, plain)
        (gradient,) = torch.autograd.grad(loss, hidden)
        torch.testing.assert_close(gradient, wanted)


def test_parts_that_are_not_there_say_what_was_looked_for() -> None:
    spec = tiny_model()
    spec["llm"] = "nobody/no-such-llm"
    with pytest.raises(UserError, match=r"no-such-llm.*local directory") as error:
        build_tiny(spec)
    assert len(str(error.value).splitlines()) <= 2
    with pytest.raises(UserError, match=r"vision tower.*Known: clip, dinov2, .*siglip.*add-your-own"):
        build_tiny(tiny_model(tower={"model_type": "vit", "hidden_size": 24}))
    with pytest.raises(UserError, match="no field hiden_size"):
        build_tiny(tiny_model(llm={"model_type": "llama", "hiden_size": 3}))
    with pytest.raises(UserError, match="24 wide and the LLM 32"):
        build_tiny(tiny_model(connector="identity"))


def test_an_empty_model_counts_without_weights() -> None:
    vlm = build_tiny(empty=True)
    assert all(parameter.is_meta for parameter in vlm.model.parameters())
    assert vlm.processor.tokens_per_image == 16
