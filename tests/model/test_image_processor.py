"""A user's own image processor, by class or file: its pixels, its statistics, and whether a checkpoint may run it."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.conftest import SIGLIP, tiny_model
from tests.tiny_session import corpus
from tests.tiny_vlm import build_tiny
from tinyllava import checkpoint
from tinyllava.config import ModelSpec
from tinyllava.data.tiles import Tiles
from tinyllava.errors import UserError

SIZES = [(100, 100), (20, 30)]  # with 4 tiles of 48 pixels: grids 2 x 2 and 1 x 1
PICTURES = [
    Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))
    for width, height in SIZES
]
DOCS = (Path(__file__).parents[2] / "docs" / "images.md").read_text(encoding="utf-8")
(GREY,) = re.findall(r"```python\n(# my_images\.py.*?)```", DOCS, flags=re.S)
MINE = (
    GREY
    + """
from tinyllava.connectors.mlp import Connector as MLP


class Mine(Grey):
    image_mean = [0.4, 0.5, 0.6]
    image_std = [0.3, 0.2, 0.25]


class Doubled(Grey):
    def _preprocess(self, images, **kwargs):
        made = super()._preprocess(images, **kwargs)
        if kwargs["do_normalize"]:
            made["pixel_values"] = [2 * image for image in made["pixel_values"]]
        return made


class Oblong(Grey):
    size = {"height": 48, "width": 40}


class Other:
    pass


class Connector(MLP):
    def __init__(self, vision_dim, text_dim):
        super().__init__(vision_dim, text_dim, layers=3)
"""
)


@pytest.fixture
def module_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "my_images.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_images", None)


def use_processor(name: str, **more: object) -> ModelSpec:
    return ModelSpec.model_validate(tiny_model(vision_tower={"config": SIGLIP, "image_processor": name, **more}))


@pytest.mark.parametrize("tiles", [None, 4])
def test_a_class_of_the_user_s_own_makes_the_pictures(module_folder: Path, tiles: int | None) -> None:
    vlm = build_tiny(use_processor("my_images:Mine", tiles=tiles), corpus())
    model, processor = vlm.model, vlm.processor
    assert model.config.image_size == 48 and processor.tokens_per_image == 36
    inputs = processor(images=PICTURES, text="<image> <image>", return_tensors="pt")
    channels = inputs["pixel_values"] * torch.tensor([0.3, 0.2, 0.25])[:, None, None]
    channels = channels + torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    torch.testing.assert_close(channels[:, 0], channels[:, 1])
    raw = processor.to_pixels(PICTURES, processor.choose_grids(SIZES) if tiles else None)
    assert raw.shape == (6 if tiles else 2, 3, 48, 48)
    model.eval()
    given = {key: inputs[key] for key in inputs}
    given["pixel_values"] = given["pixel_values"].float()
    on_device = model(**{**given, "pixel_values": raw}).logits
    torch.testing.assert_close(model(**given).logits, on_device, rtol=1e-4, atol=1e-4)

    checkpoint.save(vlm, module_folder / "c")
    loaded = checkpoint.load(module_folder / "c")
    assert not loaded.record["plain"]
    assert torch.equal(loaded.processor.to_pixels(PICTURES[1:2], [(1, 1)]), raw[-1:])


def test_a_checkpoint_s_code_does_not_run_unasked(module_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(build_tiny(use_processor("my_images:Mine", tiles=4), corpus()), module_folder / "c")
    for load in (checkpoint.load, AutoProcessor.from_pretrained):
        sys.modules.pop("my_images", None)
        with pytest.raises(UserError, match=r"image processor is code .*my_images:Mine.*\n.*TINYLLAVA_TRUST=my_images"):
            load(module_folder / "c")
        assert "my_images" not in sys.modules
        monkeypatch.setenv("TINYLLAVA_TRUST", "other,my_images")
        load(module_folder / "c")
        monkeypatch.delenv("TINYLLAVA_TRUST")
    assert AutoProcessor.from_pretrained(module_folder / "c").tiling == Tiles(4, 48)  # imported by now


def test_a_checkpoint_s_own_connector_does_not_run_unasked(module_folder: Path) -> None:
    spec = tiny_model(connector={"my_images:Connector": {}})
    checkpoint.save(build_tiny(spec, corpus()), module_folder / "c")
    assert checkpoint.load(module_folder / "c").processor.tokens_per_image == 16
    sys.modules.pop("my_images")
    for load in (checkpoint.load, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(UserError, match=r"connector is code .*my_images:Connector"):
            load(module_folder / "c")


@pytest.mark.parametrize(
    "name,says",
    [
        ("my_images:Doubled", r"its pixels differ by 0\.\d"),
        ("my_images:Oblong", r"makes .*\(3, 48, 40\).*must become \[3, S, S\]"),
        ("my_images:Other", "is not a subclass of transformers' BaseImageProcessor"),
        ("my_images:Gone", "has no attribute 'Gone'"),
        ("no_such:Thing", "No module named 'no_such'"),
        ("nowhere/else", r"nowhere/else: No such file.*Give a preprocessor_config\.json"),
    ],
)
def test_what_breaks_the_contract_says_so(module_folder: Path, name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_tiny(use_processor(name), corpus())


def test_own_code_decides_the_aspect() -> None:
    with pytest.raises(ValueError, match="remove `image_aspect`"):
        use_processor("my_images:Mine", image_aspect="pad")


def test_a_preprocessor_config_lies_over_the_family_s_fields(tmp_path: Path) -> None:
    said = {"size": 40, "crop_size": 40, "do_center_crop": True, "image_mean": [0.1, 0.2, 0.3], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    for name in (tmp_path, tmp_path / "preprocessor_config.json"):
        vlm = build_tiny(use_processor(str(name)), corpus())
        config, images = vlm.model.config, vlm.processor.image_processor
        assert config.image_mean == [0.1, 0.2, 0.3] and config.image_std == [0.5] * 3  # SigLIP's own
        assert config.image_size == 40 and images.resample == 2 and images.do_center_crop
        assert vlm.processor.to_pixels(PICTURES[:1]).shape == (1, 3, 40, 40)
    for wrong, message in [({"rescale_factor": 1 / 127.5}, "rescaled by 1/255"), ("no json", "cannot read")]:
        text = wrong if isinstance(wrong, str) else json.dumps(wrong)
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            build_tiny(use_processor(str(tmp_path)), corpus())
