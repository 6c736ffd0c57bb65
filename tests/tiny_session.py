"""A session on a tiny model whose weights are so random that its answers differ from question to question."""

import torch

from tests.conftest import LLAMA, tiny_model
from tinyllava.config import ModelSpec
from tinyllava.data.sample import Message, Sample
from tinyllava.infer import Session
from tinyllava.model.build import build

WORDS = ["What is in the picture?", "a red cat and a blue dog", "How many are there?", "two, three or four of them"]


def corpus() -> list[Sample]:
    """What the tiny tokenizer is trained on."""
    return [
        Sample([Message("user", f"<image>\n{q}"), Message("assistant", a)], ["x"]) for q in WORDS for a in WORDS
    ] * 5


def tiny_session(llm: dict = LLAMA, seed: int = 1, **more: object) -> Session:
    """A new model. Fresh initialisation would answer everything with one token over and over."""
    model, processor, template = build(ModelSpec.model_validate(tiny_model(llm=llm, **more)), corpus)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = name.endswith("weight") and parameter.dim() < 2  # of a norm
            spread = 0.02 if parameter.dim() < 2 else 0.25
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + float(scale))
    return Session(model, processor, template)
