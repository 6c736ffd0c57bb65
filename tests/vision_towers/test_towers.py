"""Every tower: its features are its own hidden states, its pictures its own processor's, whatever is run or trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from tests.conftest import CLIP, DINOV2, DINOV2_REGISTERS, DINOV3, SIGLIP, tiny_model
from tests.tiny_session import corpus
from tests.tiny_vlm import build_tiny
from tinyllava import checkpoint
from tinyllava.config import Tune
from tinyllava.errors import UserError
from tinyllava.model.modules import find_blocks
from tinyllava.model.vlm import VLM
from tinyllava.train.tune import apply_tuning, get_tunable_part

TOWERS = {tower["model_type"]: tower for tower in (CLIP, SIGLIP, DINOV2, DINOV2_REGISTERS, DINOV3)}
PREFIX = dict(zip(TOWERS, (1, 0, 1, 5, 5), strict=True))
MOF = {"model_type": "mof", "first": CLIP, "second": {**DINOV3, "num_hidden_layers": 5}}
LAYERS = [-1, -2, 0, 1, [-2, 0, 3], [-2, 0]]


def build_with(tower: dict | str, layer: int | list[int] = -2, strategy: str = "patch", **parts: object) -> VLM:
    spec = tiny_model(**parts)
    spec["vision_tower"] = {
        **({"name": tower} if isinstance(tower, str) else {"config": tower}),
        "feature_layer": layer,
        "feature_strategy": strategy,
    }
    return build_tiny(spec, corpus())


@pytest.mark.parametrize("strategy", ["patch", "cls_patch"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_features_are_the_towers_own_hidden_states(name: str, layer: int | list[int], strategy: str) -> None:
    vlm = build_with(TOWERS[name], layer, strategy)
    model, processor = vlm.model, vlm.processor
    side = model.config.image_size
    pixels = torch.randn(2, 3, side, side)
    tower = model.model.vision_tower.eval()
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 4
    first = PREFIX[name] if strategy == "patch" else 0
    wanted = torch.cat([states[at][:, first:] for at in ([layer] if isinstance(layer, int) else layer)], dim=-1)
    assert wanted.shape[1] == model.config.num_patches == (side // 8) ** 2 + PREFIX[name] - first
    for trained in (False, True):  # a frozen tower stops early
        model.requires_grad_(trained)
        torch.testing.assert_close(model.model.compute_tower_features(pixels), wanted, rtol=0, atol=0)
    assert processor.tokens_per_image == model.config.num_patches


@pytest.mark.parametrize("strategy,layer", [("patch", -2), ("patch", [-2, -1]), ("cls_patch", -2)], ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_a_checkpoint_keeps_layers_and_strategy(name: str, strategy: str, layer, tmp_path: Path) -> None:
    """Plain llava where one leading token is dropped, or none."""
    vlm = build_with(TOWERS[name], layer, strategy)
    model, processor = vlm.model.eval(), vlm.processor
    checkpoint.save(vlm, tmp_path)
    plain = json.loads((tmp_path / checkpoint.RECORD).read_text())["plain"]
    assert plain == (strategy == "cls_patch" or PREFIX[name] <= 1)
    pixels = torch.randn(1, 3, model.config.image_size, model.config.image_size)
    inputs = processor.tokenizer("<image>" * processor.tokens_per_image + " What?", return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs, pixel_values=pixels).logits
        loaded = checkpoint.load(tmp_path).model
        torch.testing.assert_close(loaded(**inputs, pixel_values=pixels).logits, wanted, rtol=0, atol=0)
        if plain:
            theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
            torch.testing.assert_close(theirs(**inputs, pixel_values=pixels).logits, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TOWERS)
def test_only_what_the_features_depend_on_is_trained(name: str) -> None:
    for layer, top in ((-2, 1), (-3, 0), (0, None)):
        model = build_with(TOWERS[name], layer).model
        part = get_tunable_part(model, "vision_tower")
        assert len(part.blocks) == 3
        used = [number for number, block in enumerate(part.blocks) if part.is_used(block)]
        assert used == ([] if top is None else list(range(top + 1)))
        pixels = torch.randn(1, 3, model.config.image_size, model.config.image_size)
        model.model.compute_tower_features(pixels).square().sum().backward()
        reached = {name for name, p in model.model.vision_tower.named_parameters() if p.grad is not None}
        assert set(part.parameters) == reached


@pytest.mark.parametrize("layer", [-1, -2, 0, [-1, 0]], ids=str)
def test_of_a_mixture_too(layer: int | list[int]) -> None:
    model = build_with(MOF, layer, connector="mlp2x_gelu").model
    model.model.compute_tower_features(torch.randn(1, 3, 32, 32)).square().sum().backward()
    reached = {name for name, p in model.model.vision_tower.named_parameters() if p.grad is not None}
    assert set(get_tunable_part(model, "vision_tower").parameters) == reached


def test_partial_of_a_mixture_counts_the_layers_of_both() -> None:
    """Three layers and five, the last of each above the features."""
    for last, wanted in ((2, {"first": {1}, "second": {3}}), (3, {"first": {1}, "second": {2, 3}})):
        model = build_with(MOF, connector="mof_mlp").model
        apply_tuning(
            model, Tune.model_validate({"vision_tower": {"partial": {"last": last}}, "connector": "frozen"}), seed=0
        )
        trained: dict[str, set[int]] = {}
        for name, parameter in model.model.vision_tower.named_parameters():
            if parameter.requires_grad:
                steps = name.split(".")
                trained.setdefault(steps[0], set()).add(next(int(step) for step in steps if step.isdigit()))
        assert trained == wanted
    with pytest.raises(UserError, match="last 7 layers, but it has 6 in use"):
        apply_tuning(model, Tune.model_validate({"vision_tower": {"partial": {"last": 7}}}), seed=0)


@pytest.mark.parametrize("layer,reached", [(-2, 2), (0, 0), ([0, -3], 1), ([-1, 0], 3)], ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_a_frozen_tower_runs_no_layer_above_the_highest_that_is_used(name: str, layer, reached: int) -> None:
    model = build_with(TOWERS[name], layer).model
    tower, ran = model.model.vision_tower, []
    for block in find_blocks(tower):
        tower.get_submodule(block).register_forward_hook(lambda *_, block=block: ran.append(block))
    model.requires_grad_(False).model.compute_tower_features(torch.zeros(1, 3, 32, 32))
    assert ran == find_blocks(tower)[:reached]


def test_a_frozen_dinov3_does_not_stretch_its_positions() -> None:
    """Its config has pos_embed_rescale 2.0, which acts in training mode."""
    model = build_with(DINOV3).model
    pixels = torch.randn(1, 3, 32, 32)
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert torch.equal(model.model.compute_tower_features(pixels), model.model.compute_tower_features(pixels))
    assert model.model.multi_modal_projector.training and not model.model.vision_tower.training
    model.requires_grad_(True).train()
    assert not torch.equal(model.model.compute_tower_features(pixels), model.model.compute_tower_features(pixels))


def test_dinov3s_positions_depend_on_the_grid_alone() -> None:
    """A tower trained at one size runs at another without interpolation: only what the pictures' size says changes."""
    model = build_with(DINOV3).model
    with torch.no_grad():
        features = model.model.compute_tower_features(torch.randn(1, 3, 64, 64))
    assert features.shape == (1, 64, 24)
    assert not any("position" in name for name, _ in model.model.vision_tower.named_parameters())


def saved_tower(folder: Path, fields: dict) -> torch.nn.Module:
    fields = dict(fields)
    tower = AutoModel.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()
    tower.save_pretrained(folder)
    return tower


def test_dinov3s_own_settings_are_read_without_torchvision(tmp_path: Path) -> None:
    tower = saved_tower(tmp_path, {**DINOV3, "image_size": 64})
    fields = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 48, "width": 48}, "resample": 2}
    fields |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3, "do_center_crop": None, "crop_size": None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    vlm = build_with(str(tmp_path))
    model, processor = vlm.model, vlm.processor
    assert (model.config.image_size, processor.tokens_per_image) == (48, 36)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    wanted = np.asarray(picture.resize((48, 48), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(processor.to_pixels([picture])[0].numpy(), wanted)
    with torch.no_grad():
        mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
        states = tower((torch.tensor(wanted)[None] / 255 - mean) / 0.5, output_hidden_states=True).hidden_states
        torch.testing.assert_close(
            model.eval().model.compute_tower_features(processor.to_pixels([picture])),
            states[-2][:, 5:],
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_by_directory_without_an_image_processor(name: str, tmp_path: Path) -> None:
    tower = saved_tower(tmp_path, TOWERS[name])
    model = build_with(str(tmp_path)).model
    for key, parameter in tower.named_parameters():
        assert torch.equal(model.model.vision_tower.get_parameter(key), parameter)


def test_a_whole_fixed_resolution_siglip2_is_read_as_siglip(tmp_path: Path) -> None:
    """google/siglip2-base-patch16-256 and its kin: model_type siglip, a text tower beside, bilinear pictures."""
    vision = {key: value for key, value in SIGLIP.items() if key != "model_type"}
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 99, "projection_size": 24, "eos_token_id": 1, "bos_token_id": 2}
    whole = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    whole.save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "siglip"
    vlm = build_with(str(tmp_path))
    model, processor = vlm.model, vlm.processor
    assert model.config.vision_config.model_type == "siglip_vision_model" and processor.tokens_per_image == 16
    assert processor.image_processor.resample == 2
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(model.model.compute_tower_features(pixels), wanted, rtol=0, atol=0)


def test_towers_that_cannot_be_say_what_can() -> None:
    with pytest.raises(UserError, match=r"NaFlex SigLIP2 .*google/siglip2-base-patch16-256") as error:
        build_with({"model_type": "siglip2_vision_model", "hidden_size": 24, "num_attention_heads": 4})
    assert len(str(error.value).splitlines()) <= 2
    with pytest.raises(UserError, match="NaFlex SigLIP2"):
        build_with({**MOF, "second": {"model_type": "siglip2_vision_model"}})
    for layer in (4, -5, [-2, 4]):
        with pytest.raises(UserError, match=r"feature_layer (4|-5): the tower has 3 layers\. Choose one of -4 \.\. 3"):
            build_with(CLIP, layer)
