"""Measure the speed of a training step, compared with transformers' Llava on the same weights and the same batch.

    python perf/train_step.py            # 2 minutes on one core; prints a table

Our step differs in two ways. It computes the head and the loss only for supervised positions. It runs a frozen vision
tower without autograd, and only up to the layer that is used. The time is the CPU time of the process, because the
machine may be shared. Both sides run in turn in one process, and the best of the runs counts.
"""

import argparse
import time
from typing import NamedTuple

import torch
from rich.table import Table
from transformers import LlavaForConditionalGeneration

from tinyllava.checkpoint.layout import make_plain_config
from tinyllava.config import ModelSpec, Tune
from tinyllava.console import output
from tinyllava.data.labels import IGNORE
from tinyllava.data.sample import Sample
from tinyllava.data.tokenizer import train_tokenizer
from tinyllava.model.build import build, load_template
from tinyllava.train.tune import apply_tuning

REPEATS = 5
ROWS = 4  # samples in the batch
TEXT = 64  # positions after the image
TUNES = {
    "connector only": {"llm": "frozen"},
    "connector and LLM": {"llm": "full"},
}
MODEL = {  # the proportions of a small VLM: 196 image tokens, a vocabulary of 32,000, a tower as deep as the LLM
    "llm": {
        "config": {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
        },
        "tokenizer": {"vocab_size": 300},
    },
    "vision_tower": {
        "config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": 224,
            "patch_size": 16,
        }
    },
    "connector": "mlp2x_gelu",
    "template": "plain",
}


class Step(NamedTuple):
    """One forward and backward pass: its CPU seconds and its loss."""

    seconds: float
    loss: float


def make_batch(image_token: int, image_tokens: int, supervised: int) -> dict[str, torch.Tensor]:
    """Return ROWS samples of one image and TEXT positions after it; the last `supervised` positions have labels."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(300, 32000, (ROWS, TEXT), generator=generator)  # above the ids of the special tokens
    ids = torch.cat([torch.full((ROWS, image_tokens), image_token), words], dim=1)
    labels = ids.clone()
    labels[:, :-supervised] = IGNORE
    pixels = torch.randn(ROWS, 3, 224, 224, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def run_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Step:
    """Run one forward and backward pass and measure its CPU seconds."""
    model.zero_grad()
    start = time.process_time()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return Step(time.process_time() - start, loss.item())


def compare_steps(tune: dict[str, str], supervised: int) -> list[str]:
    """Run the step of both sides with the same weights; returns the cells of a row after the name of the tuning."""
    record = {
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}],
        "image": "a",
    }
    spec = ModelSpec.model_validate(MODEL)
    tokenizer = train_tokenizer(load_template(spec), [Sample.from_llava(record)], spec.llm.tokenizer.vocab_size)
    ours = build(spec, tokenizer).model
    theirs = LlavaForConditionalGeneration(make_plain_config(ours))
    theirs.load_state_dict(ours.state_dict())
    apply_tuning(ours, Tune.model_validate(tune), seed=0)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in trained)
    inputs = make_batch(ours.config.image_token_id, ours.config.image_seq_length, supervised)
    # In turn, so that a change of the machine's load affects both sides.
    runs = [(run_step(theirs.train(), inputs), run_step(ours.train(), inputs)) for _ in range(REPEATS)]
    their_best, our_best = (min(run[side].seconds for run in runs) for side in (0, 1))
    losses = " ".join(f"{step.loss:.5f}" for step in runs[0])
    positions = inputs["input_ids"].shape[1]
    speed_up = f"{their_best / our_best:.2f} x"
    return [f"{supervised} of {positions}", f"{their_best:.2f}", f"{our_best:.2f}", speed_up, losses]


def main() -> None:
    """Measure both sides for each tuning, with few and with many supervised positions."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    table = Table("trained parts", "supervised", "transformers, CPU s", "ours, CPU s", "speed-up", "losses")
    for name, tune in TUNES.items():
        for supervised in (8, 48):
            table.add_row(name, *compare_steps(tune, supervised))
    output.print(table)


if __name__ == "__main__":
    main()
