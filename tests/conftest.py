"""Fixtures for all tests: no network, one thread, a new cache for each test, and tiny models of real classes."""

import json
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
from PIL import Image

# A shell ignores these for what it starts in the background, and everything below would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
PHI = {
    "model_type": "phi",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
DINOV2 = {
    "model_type": "dinov2",
    **{key: CLIP[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
}
DINOV2 |= {"image_size": 56, "patch_size": 8}
DINOV2_REGISTERS = {**DINOV2, "model_type": "dinov2_with_registers", "num_register_tokens": 4}
DINOV3 = {**CLIP, "model_type": "dinov3_vit", "num_register_tokens": 4, "num_attention_heads": 3}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-matrix", action="store_true", help="tests/test_matrix.py: every combination, not a sample")


def tiny_model(llm: dict = LLAMA, tower: dict = CLIP, connector: object = "mlp2x_gelu", **more: object) -> dict:
    """The `model:` section of a recipe whose parts have random weights."""
    return {
        "llm": {"config": llm, "tokenizer": {"vocab_size": 400}},
        "vision_tower": {"config": tower},
        "connector": connector,
        "template": "llama",
        **more,
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own cache, so that no test uses the tokenised data of another."""
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 images, captions.json and instructions.json (some with several turns, some without an image)."""
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def make_pictures(folder: Path) -> Path:
    """Write the images and the annotations of `pictures` into a folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    captions, instructions = [], []
    for number in range(24):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / name)
        answer = f"thing number {number}" + " and more" * int(rng.integers(0, 6))
        asked = {"from": "human", "value": "<image>\nWhat is it?"}
        captions.append({"id": f"c{number}", "image": name, "conversations": [asked, {"from": "gpt", "value": answer}]})
        more = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}] if number % 5 == 0 else []
        if number % 6 == 1:
            turns = [{"from": "human", "value": "Say a thing."}, {"from": "gpt", "value": answer}]
            instructions.append({"id": f"t{number}", "conversations": turns + more})
        else:
            turns = [asked, {"from": "gpt", "value": answer}]
            instructions.append({"id": f"i{number}", "image": name, "conversations": turns + more})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "instructions.json").write_text(json.dumps(instructions))
    return folder
