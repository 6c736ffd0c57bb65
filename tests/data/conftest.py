"""Real files for the data tests: pictures by Pillow, annotation files, a byte-level BPE trained on the spot."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tinyllava.data.template import add_image_token

TEXTS = ["USER: what is it? ASSISTANT: a red cat and a blue dog", "how many are there? two, three or four of them"] * 4


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=end, unk_token=end)
    add_image_token(fast)
    return fast


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test prepares its data anew."""
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with red.jpg, green.jpg, blue.jpg (32 x 24) and two files without a picture: broken.jpg, empty.jpg."""
    root = tmp_path / "pictures"
    root.mkdir()
    for name, colour in {"red": (250, 5, 5), "green": (5, 250, 5), "blue": (5, 5, 250)}.items():
        Image.new("RGB", (32, 24), colour).save(root / f"{name}.jpg", quality=95)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "broken.jpg")
    whole = (root / "broken.jpg").read_bytes()
    (root / "broken.jpg").write_bytes(whole[: len(whole) // 2])  # its header is right
    (root / "empty.jpg").write_bytes(b"")
    return root


@pytest.fixture
def write(tmp_path: Path):
    """write(records, "name.json" | "name.jsonl") -> path"""

    def write(records: list, name: str = "data.json") -> str:
        lines = [json.dumps(record) for record in records]
        text = "\n".join(lines) if name.endswith("l") else "[" + ",\n ".join(lines) + "]"
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def llava():
    """llava("7", "red.jpg", ("<image>\\nwhat is it?", "a red cat"), ...) -> a LLaVA record"""

    def llava(identity: str, image: str | list[str] | None, *rounds: tuple[str, str]) -> dict:
        turns = []
        for question, answer in rounds:
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": identity, **({"image": image} if image else {}), "conversations": turns}

    return llava
