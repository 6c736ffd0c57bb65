"""Combine LLMs, towers, connectors and tunings: each model is built, trained, saved, loaded, and generates.

The whole product has 3072 cases, so a fixed sample of it is run in which every pair of an LLM with a tower or a tuning,
of a connector with a tower or a tuning, and of a tower with a tuning occurs. The rest:

    pytest tests/test_matrix.py --full-matrix
"""

from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import CLIP, DINOV2, DINOV2_REGISTERS, DINOV3, SIGLIP
from tests.llms.tiny_llms import LLMS
from tests.tiny_session import WORDS, corpus
from tests.tiny_vlm import build_tiny
from tinyllava import checkpoint
from tinyllava.config import TokenizerSpec, Tune
from tinyllava.data.encode import expand
from tinyllava.data.sample import Message, Sample
from tinyllava.data.template import Template, add_image_token
from tinyllava.data.tokenizer import train_tokenizer
from tinyllava.infer import Session
from tinyllava.model.vlm import VLM
from tinyllava.train.tune import apply_tuning

WIDE = {"hidden_size": 32, "image_size": 32}  # as wide as the LLMs, so that `identity` fits
HALF = {"hidden_size": 16, "image_size": 32, "num_attention_heads": 2}
STILL = {"pos_embed_rescale": None}  # or a trained DINOv3 sees other positions at each step
TOWERS = {
    "clip": {**CLIP, **WIDE},
    "siglip": {**SIGLIP, **WIDE},
    "dinov2": {**DINOV2, **WIDE},
    "dinov2_with_registers": {**DINOV2_REGISTERS, **WIDE},
    "dinov3_vit": {**DINOV3, **WIDE, **STILL, "num_attention_heads": 4},
    "mof": {"model_type": "mof", "first": {**CLIP, **HALF}, "second": {**DINOV3, **HALF, **STILL}},
}
QFORMER = {"num_queries": 6, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
QFORMER |= {"intermediate_size": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONNECTORS: dict[str, Any] = {
    "identity": "identity",
    "linear": "linear",
    "mlp2x_gelu": "mlp2x_gelu",
    "mlp3x_silu": "mlp3x_silu",
    "resampler": {"resampler": {"num_queries": 5, "layers": 1}},
    "qformer": {"qformer": QFORMER},
    "mof_mlp": "mof_mlp",
    "pixel_shuffle_mlp": "pixel_shuffle_mlp",
}
TUNINGS: dict[str, Any] = {
    "frozen": "frozen",
    "full": "full",
    "partial": {"partial": {"last": 1}},
    "lora": {"lora": {"r": 4, "alpha": 8}},
}
AXES = (LLMS, TOWERS, CONNECTORS, TUNINGS)
PAIRS = ((0, 1), (1, 2), (0, 3), (2, 3), (1, 3))  # of axes, all of whose values meet in the sample
Case = tuple[str, ...]


def choose_sample(cases: list[Case]) -> list[Case]:
    """Choose few cases that contain every pair. Each next case has the most new pairs; if equal, the rarest values."""
    pairs = {case: {(pair, case[pair[0]], case[pair[1]]) for pair in PAIRS} for case in cases}
    left, seen, chosen = set().union(*pairs.values()), Counter(), []
    while left:
        chosen.append(max(cases, key=lambda case: (len(pairs[case] & left), -sum(seen[value] for value in case))))
        left -= pairs[chosen[-1]]
        seen.update(chosen[-1])
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = list(product(*AXES))
        chosen = cases if metafunc.config.getoption("full_matrix") else choose_sample(cases)
        metafunc.parametrize("case", chosen, ids="-".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for all models, because training one takes longer than everything else."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_tokenizer(Template.load("llama"), corpus(), TokenizerSpec(vocab_size=320).vocab_size)
    add_image_token(trained)
    trained.save_pretrained(folder)
    return folder


def make_batch(vlm: VLM) -> dict[str, torch.Tensor]:
    """A batch of one image, one question and one answer, as in training."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    sample = Sample([Message("user", f"<image>\n{WORDS[0]}"), Message("assistant", WORDS[1])], [picture])
    row = vlm.template.encode(sample, vlm.tokenizer)
    ids, labels = (np.array(row[name]) for name in ("input_ids", "labels"))
    ids, labels = expand(ids, labels, vlm.model.config.image_token_id, vlm.processor.tokens_per_image)
    assert 0 < (labels != -100).sum() < len(WORDS[1])
    pixels = vlm.processor.to_pixels([picture])
    return {"input_ids": torch.tensor(ids)[None], "labels": torch.tensor(labels)[None], "pixel_values": pixels}


def train_on(model: Any, batch: dict[str, torch.Tensor], steps: int = 2) -> list[float]:
    """Train a few steps; returns the losses before, between and after them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return [*losses, model(**batch).loss.item()]


def test_a_model_is_built_trained_saved_loaded_and_generates(case: Case, tokenizer: Path, tmp_path: Path) -> None:
    llm, tower, connector, tuning = case
    spec = {
        "llm": {"config": LLMS[llm], "tokenizer": str(tokenizer)},
        "vision_tower": {"config": TOWERS[tower]},
        "connector": CONNECTORS[connector],
        "template": "llama",
    }
    vlm = build_tiny(spec)
    model = vlm.model
    tune = {"vision_tower": TUNINGS[tuning], "llm": TUNINGS[tuning], "connector": "full"}
    if (connector, tuning) == ("identity", "frozen"):  # nothing of it can be trained
        tune["vision_tower"] = TUNINGS["partial"]
    rows = {row.part: row.trainable for row in apply_tuning(model, Tune.model_validate(tune), seed=0)}
    assert bool(rows["llm"]) == (tuning != "frozen") and bool(rows["connector"]) == (connector != "identity")

    batch = make_batch(vlm)
    losses = train_on(model, batch)
    assert all(np.isfinite(losses)) and all(later < earlier for earlier, later in pairwise(losses)), losses

    model.eval()
    checkpoint.save(vlm, tmp_path)
    loaded = checkpoint.load(tmp_path)
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    question = Sample([Message("user", f"<image>\n{WORDS[0]}")], [Image.new("RGB", (40, 50), "teal")])
    answers = [Session(one).generate([question], max_new_tokens=3) for one in (vlm, loaded)]
    assert answers[0] == answers[1]


def test_the_sample_contains_every_pair() -> None:
    cases = choose_sample(list(product(*AXES)))
    for one, other in PAIRS:
        assert {(case[one], case[other]) for case in cases} == set(product(AXES[one], AXES[other]))
    assert len(cases) < 120
