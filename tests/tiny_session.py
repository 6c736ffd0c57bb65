"""Build a session on a tiny model whose answers differ from question to question."""

import random

import numpy as np
import torch
from PIL import Image

from tests.conftest import LLAMA, tiny_model
from tests.tiny_vlm import build_tiny
from tinyllava.data.sample import Message, Sample
from tinyllava.infer import Session

WORDS = ["What is in the picture?", "a red cat and a blue dog", "How many are there?", "two, three or four of them"]
NEW = {"max_new_tokens": 10}


def corpus() -> list[Sample]:
    """The texts on which the tiny tokenizer is trained."""
    return [
        Sample([Message("user", f"<image>\n{q}"), Message("assistant", a)], ["x"]) for q in WORDS for a in WORDS
    ] * 5


def tiny_session(llm: dict = LLAMA, seed: int = 1, **more: object) -> Session:
    """Build a new model with large random weights. With the usual ones, it would repeat one token as each answer."""
    vlm = build_tiny(tiny_model(llm=llm, **more), corpus())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            scale = name.endswith("weight") and parameter.dim() < 2  # of a norm
            spread = 0.02 if parameter.dim() < 2 else 0.25
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + float(scale))
    return Session(vlm)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8))


PICTURES = [picture(seed) for seed in range(4)]


def question(seed: int, images: int | None = None) -> Sample:
    """A question with none, one or two images."""
    rng = random.Random(seed)
    images = rng.choice([0, 1, 1, 2]) if images is None else images
    text = "<image>\n" * images + " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
    return Sample([Message("user", text)], rng.sample(PICTURES, images), str(seed))
