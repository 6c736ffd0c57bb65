"""Build a VLM whose parts are tiny and have random weights."""

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

from tests.conftest import tiny_model
from tinyllava.config import ModelSpec, TokenizerSpec, Tune
from tinyllava.data.sample import Sample
from tinyllava.data.tokenizer import train_tokenizer
from tinyllava.model.build import build, load_template
from tinyllava.model.vlm import VLM
from tinyllava.train.tune import apply_tuning

SAMPLE = Sample.from_llava(
    {
        "id": "a",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    }
)


def build_tiny(
    spec: dict | ModelSpec | None = None, samples: Iterable[Sample] = (SAMPLE,), seed: int = 42, empty: bool = False
) -> VLM:
    """The VLM of a recipe's `model:` section, by default `tiny_model()`. Its tokenizer is trained on `samples`."""
    spec = ModelSpec.model_validate(tiny_model() if spec is None else spec)
    tokenizer = None
    if isinstance(spec.llm.tokenizer, TokenizerSpec):
        tokenizer = train_tokenizer(load_template(spec), samples, spec.llm.tokenizer.vocab_size)
    return build(spec, tokenizer, seed, empty)


def build_moved_vlm(tune: dict | None = None, **parts: object) -> VLM:
    """A tiny VLM in which every weight has been changed, also in adapters, as if it had been trained."""
    vlm = build_tiny(tiny_model(**parts))
    if tune:
        apply_tuning(vlm.model, Tune.model_validate(tune), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    vlm.model.eval()
    return vlm


def compute_logits(model: torch.nn.Module, processor: object, folder: Path) -> torch.Tensor:
    """The logits [1, T, V] of one question on an image of the fixture `pictures`."""
    image = Image.open(folder / "3.png").convert("RGB")
    inputs = processor(images=image, text="USER: <image>\nWhat is it? ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits
