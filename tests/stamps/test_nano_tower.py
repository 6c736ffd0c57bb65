"""Pretraining a tower: its data, that it learns, and that the saved tower is an ordinary part."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, SiglipVisionConfig, SiglipVisionModel, set_seed

from tests.conftest import tiny_model
from tests.tiny_vlm import build_tiny
from tinyllava.stamps import get_tier, patches
from tinyllava.stamps import nano_tower as tower
from tinyllava.stamps.nano_tower import PatchWords, SceneImages

SMALL = {**tower.CONFIG, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tower after a few steps, trained by the function of the command."""
    output = tmp_path_factory.mktemp("tower")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "CONFIG", SMALL)
        patch.setattr(tower, "CHECKED", 64)
        tower.pretrain_tower(output, count=4 * tower.BATCH)
    return output


def test_pictures_are_the_same_for_everybody_and_never_those_of_another_split() -> None:
    tier, config = get_tier("tiny"), SiglipVisionConfig(**SMALL)
    one, again = (list(SceneImages(tier, config, "train", 6)) for _ in range(2))
    other = list(SceneImages(tier, config, "check", 6))
    for a, b, c in zip(one, again, other, strict=True):
        assert a["pixels"].shape == (3, 96, 96) and a["pixels"].dtype == np.uint8
        assert (a["pixels"] == b["pixels"]).all() and (a["targets"] == b["targets"]).all()
        assert (a["pixels"] != c["pixels"]).any()


def test_the_loss_compares_a_patch_with_the_words_of_each_sort_and_leaves_unknown_ones_out() -> None:
    set_seed(0)
    known = {"name": ("nothing", "cat", "dog"), "colour": ("red", "blue")}
    model = PatchWords(SiglipVisionModel(SiglipVisionConfig(**SMALL)), known)
    pixels = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    targets = torch.full((2, 2, 36), patches.UNKNOWN)
    targets[0, 0, 5], targets[1, 0, 7], targets[1, 1, 7] = 1, 2, 0
    name, colour = (scores.log_softmax(-1) for scores in model.score_words(pixels))
    expected = -(name[5, 1] + name[36 + 7, 2]) / 2 - colour[36 + 7, 0]
    torch.testing.assert_close(model(pixels, targets)["loss"], expected)
    targets[1, 1, 7] = patches.UNKNOWN  # no patch has a known colour
    torch.testing.assert_close(model(pixels, targets)["loss"], -(name[5, 1] + name[36 + 7, 2]) / 2)


def test_it_learns_names_and_backgrounds() -> None:
    set_seed(0)
    tier, config = get_tier("tiny"), SiglipVisionConfig(**SMALL)
    model = PatchWords(SiglipVisionModel._from_config(config), patches.build_vocabulary(tier.concepts))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    pictures = list(SceneImages(tier, config, "train", 64))
    batch = {key: torch.from_numpy(np.stack([one[key] for one in pictures])) for key in pictures[0]}
    losses = []
    for _ in range(30):
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_what_is_saved_is_a_part_of_a_recipe(trained: Path) -> None:
    loaded = AutoModel.from_pretrained(trained, dtype=torch.float32)
    assert type(loaded) is SiglipVisionModel and loaded.config.image_size == 96
    spec = tiny_model(vision_tower={"name": str(trained), "feature_layer": -1})
    vlm = build_tiny(spec | {"dtype": "float32"})
    for name, weight in vlm.model.model.vision_tower.state_dict().items():
        torch.testing.assert_close(weight, loaded.state_dict()[name], rtol=0, atol=0)
    assert vlm.processor.tokens_per_image == 36


def test_the_manifest_lists_what_it_saw(trained: Path) -> None:
    manifest, tier = json.loads((trained / "manifest.json").read_text()), get_tier("pretrain")
    assert manifest["runs"] == [{"pictures": 4 * tower.BATCH, "written": 0.15, "seed": 0}]
    assert manifest["concepts"] == list(tier.concepts)
    assert manifest["held_out"]["concepts"] == list(tier.held_out)
    assert set(manifest["accuracy"]) == set(patches.build_vocabulary(tier.concepts))


def test_a_run_starts_from_another(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "CONFIG", SMALL)
    monkeypatch.setattr(tower, "CHECKED", 64)
    tower.pretrain_tower(tmp_path, 2 * tower.BATCH, written=0.5, start=trained, seed=1)
    before, after = (load_file(folder / tower.WHOLE) for folder in (trained, tmp_path))
    moved = max((before[name] - after[name]).abs().max() for name in before)
    assert 0 < moved < 1e-4  # two steps of a warming-up rate
    assert json.loads((tmp_path / "manifest.json").read_text())["runs"][1]["written"] == 0.5


def test_sorts_of_words_that_an_earlier_run_did_not_have_start_from_random_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower, "CONFIG", SMALL)
    monkeypatch.setattr(tower, "CHECKED", 64)
    earlier = tmp_path / "earlier"
    shutil.copytree(trained, earlier)
    known = load_file(trained / tower.WHOLE)
    save_file({name: weight for name, weight in known.items() if ".count." not in name}, earlier / tower.WHOLE)
    tower.pretrain_tower(tmp_path / "later", tower.BATCH, start=earlier, seed=1)
    later = load_file(tmp_path / "later" / tower.WHOLE)
    moved = {name: (known[name] - later[name]).abs().max() for name in known}
    assert moved.pop("words.count.weight") > 0.01 and moved.pop("words.count.bias") > 0.01
    assert max(moved.values()) < 1e-4
