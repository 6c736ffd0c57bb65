"""A mixture is its two towers, each on its own pixels, joined patch by patch."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from tests.conftest import CLIP, DINOV2, DINOV2_REGISTERS, DINOV3, SIGLIP, tiny_model
from tests.tiny_vlm import build_tiny
from tinyllava import checkpoint
from tinyllava.config import Tune
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.model.vlm import VLM
from tinyllava.train.tune import apply_tuning

VIT = {**CLIP, "model_type": "vit"}  # transformers has it; the package has no file for it
DEEP_SIGLIP = {**SIGLIP, "num_hidden_layers": 5, "hidden_size": 32}
PAIRS = {
    "clip-dinov2": (CLIP, DINOV2),
    "deeper-first": (DEEP_SIGLIP, CLIP),
    "smaller-patches": (CLIP, {**DEEP_SIGLIP, "patch_size": 4, "image_size": 16}),
    "siglip-dinov3": (SIGLIP, DINOV3),
    "registers-siglip": ({**DINOV2_REGISTERS, "image_size": 32}, SIGLIP),
}


def mixture(first: dict, second: dict, **fields: object) -> dict:
    return {"model_type": "mof", "first": first, "second": second, **fields}


def build_mixture(tower: dict | None = None, **parts: object) -> VLM:
    vlm = build_tiny(tiny_model(tower=tower or mixture(CLIP, DINOV2), **parts))
    vlm.model.eval()
    return vlm


def pixels(side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("first,second", PAIRS.values(), ids=PAIRS)
def test_it_is_its_two_towers_each_on_its_own_pixels(first: dict, second: dict) -> None:
    model = build_mixture(mixture(first, second)).model
    tower, parts = model.model.vision_tower, []
    for own, (mean, std) in zip(
        (tower.first, tower.second),
        zip(tower.config.image_mean, tower.config.image_std, strict=True),
        strict=True,
    ):
        raw = pixels().float() / 255
        side = 4 * own.config.patch_size  # a grid of 4 x 4 for both
        if side != 32:
            raw = torch.nn.functional.interpolate(raw, size=(side, side), mode="bicubic", antialias=True)
        normal = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        states = own(normal, output_hidden_states=True).hidden_states[-2]
        parts.append(states[:, states.shape[1] - 16 :])
    torch.testing.assert_close(
        model.model.compute_tower_features(pixels()), torch.cat(parts, dim=-1), atol=1e-5, rtol=1e-5
    )
    assert tower.config.image_mean[0] != tower.config.image_mean[1]


@torch.no_grad()
def test_equal_statistics_give_both_the_first_towers_pixels() -> None:
    same = {"image_mean": [[0.5] * 3] * 2, "image_std": [[0.25] * 3] * 2}
    model = build_mixture(mixture(CLIP, DINOV2, **same)).model
    seen = torch.randn(1, 3, 32, 32)
    inputs = model.model.vision_tower.split_inputs(seen, [0])
    assert len(inputs) == 2 and all(torch.equal(member.pixel_values, seen) for member in inputs)


@pytest.mark.parametrize("layer", [-1, -2, [-2, -1]], ids=str)
def test_stopping_early_changes_nothing(layer: int | list[int]) -> None:
    spec = tiny_model(tower=mixture(DEEP_SIGLIP, DINOV2))
    spec["vision_tower"]["feature_layer"] = layer
    model = build_tiny(spec).model
    ran = []
    model.model.vision_tower.first.encoder.layers[4].register_forward_hook(lambda *_: ran.append(1))
    whole = model.requires_grad_(True).model.compute_tower_features(pixels())
    assert len(ran) == 1
    torch.testing.assert_close(
        model.requires_grad_(False).model.compute_tower_features(pixels()), whole, rtol=0, atol=0
    )
    assert len(ran) == (1 if layer == -2 else 2)


@pytest.mark.parametrize("tune", [None, "lora"])
@pytest.mark.parametrize("connector", ["mof_mlp", "mlp2x_gelu"])
def test_saved_and_loaded_it_is_the_same(connector: str, tune: str | None, tmp_path: Path) -> None:
    vlm = build_mixture(mixture(DEEP_SIGLIP, DINOV2), connector=connector)
    model = vlm.model
    if tune:
        lora = {"lora": {"r": 2, "alpha": 4}}
        apply_tuning(model, Tune.model_validate({"vision_tower": lora, "llm": lora}), seed=0)
    if connector == "mof_mlp":  # 32 channels of the first tower, 24 of the second
        assert model.config.connector == {"mof_mlp": {"first_dim": 32}}
    assert vlm.processor.tokens_per_image == (32 if connector == "mof_mlp" else 16)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        wanted = model.model.get_image_features(pixels()).pooler_output
        checkpoint.save(vlm, tmp_path / "c")
        loaded = checkpoint.load(tmp_path / "c").model
        for one, other in zip(loaded.model.get_image_features(pixels()).pooler_output, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_two_towers_by_name(tmp_path: Path) -> None:
    folders = []
    for number, fields in enumerate((CLIP, DINOV2)):
        tower = AutoModel.from_config(AutoConfig.for_model(**copy.deepcopy(fields)))
        tower.save_pretrained(tmp_path / str(number))
        folders.append((tmp_path / str(number), tower))
    spec = tiny_model(connector="mof_mlp")
    spec["vision_tower"] = "mof:" + "+".join(str(folder) for folder, _ in folders)
    model = build_tiny(spec).model
    mixed = model.model.vision_tower
    for own, (_, tower) in zip((mixed.first, mixed.second), folders, strict=True):
        for name, parameter in tower.named_parameters():
            torch.testing.assert_close(own.get_parameter(name), parameter, rtol=0, atol=0)
    spec["vision_tower"] = f"mof:{folders[0][0]}"
    with pytest.raises(UserError, match="a mixture has two towers"):
        build_tiny(spec)


def test_a_tower_that_nothing_is_known_about_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown vision tower family 'vit'.*\n?.*docs/add-your-own-vision-tower.md"):
        build_mixture(mixture(CLIP, VIT))


class OneClassToken:
    """What a user knows about ViT, which the package has no file for."""

    @staticmethod
    def prefix_tokens(config: PreTrainedConfig) -> int:
        return 1

    @staticmethod
    def image_processor(config: PreTrainedConfig) -> dict:
        square = {"height": config.image_size, "width": config.image_size}
        return {"size": square, "do_center_crop": False, "image_mean": [0.1] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize("by_name", [False, True], ids=["config", "name"])
def test_a_tower_that_the_user_registered_can_be_a_member(
    by_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Factory("vision_towers"), "registered", {"vit": OneClassToken})
    spec = tiny_model(tower=mixture(CLIP, VIT), connector="mof_mlp")
    if by_name:
        for name, fields in (("clip", CLIP), ("vit", VIT)):
            AutoModel.from_config(AutoConfig.for_model(**fields)).save_pretrained(tmp_path / name)
        spec["vision_tower"] = f"mof:{tmp_path / 'clip'}+{tmp_path / 'vit'}"
    vlm = build_tiny(spec)
    vlm.model.eval()
    tower = vlm.model.model.vision_tower
    assert type(tower.second).__name__ == "ViTModel" and tower.config.image_mean[1] == [0.1] * 3
    with torch.no_grad():
        features = vlm.model.model.compute_tower_features(pixels())
        normal = (pixels().float() / 255 - 0.1) / 0.5
        wanted = tower.second(normal, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(features[..., 24:], wanted, atol=1e-5, rtol=1e-5)
        checkpoint.save(vlm, tmp_path / "saved")
        loaded = checkpoint.load(tmp_path / "saved").model
        torch.testing.assert_close(loaded.model.compute_tower_features(pixels()), features, rtol=0, atol=0)
