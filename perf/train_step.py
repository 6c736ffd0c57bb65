"""One training step, ours against transformers' own Llava, on the same weights and the same batch.

    python perf/train_step.py            # 2 minutes on one core; prints a table

What differs: the head and the loss run on supervised positions only, and a frozen tower runs without autograd up to
the layer that is used. Process CPU seconds (machines are shared and noisy), best of the repeats, both sides in one
run, alternating.
"""

import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration

from tinyllava.config import ModelSpec, Tune
from tinyllava.data.sample import Sample
from tinyllava.model.build import build
from tinyllava.model.layout import plain_config
from tinyllava.train.tune import apply_tuning

REPEATS = 5
TUNES = {
    "connector only": {"llm": "frozen"},
    "connector and LLM": {"llm": "full"},
}
MODEL = {  # the proportions of a small VLM: 196 image tokens, a vocabulary of 32,000, a tower as deep as it is wide
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


def batch(image_token: int, tokens: int, supervised: int, rows: int = 4, text: int = 64) -> dict[str, torch.Tensor]:
    """`rows` samples with one picture, `text` positions after it, the last `supervised` of them with labels."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(300, 32000, (rows, text), generator=generator)
    ids = torch.cat([torch.full((rows, tokens), image_token), words], dim=1)
    labels = ids.clone()
    labels[:, :-supervised] = -100
    pixels = torch.randn(rows, 3, 224, 224, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def seconds(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """CPU seconds of one forward and backward pass, and its loss."""
    model.zero_grad()
    start = time.process_time()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return time.process_time() - start, loss.item()


def main() -> None:
    """Measure both sides for each tuning."""
    torch.set_num_threads(1)
    record = {
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}],
        "image": "a",
    }
    table = Table("training", "supervised", "transformers, s", "ours, s", "speed-up", "losses")
    for name, tune in TUNES.items():
        for supervised in (8, 48):
            ours, *_ = build(ModelSpec.model_validate(MODEL), lambda: [Sample.from_llava(record)])
            theirs = LlavaForConditionalGeneration(plain_config(ours))
            theirs.load_state_dict(ours.state_dict())
            apply_tuning(ours, Tune.model_validate(tune), seed=0)
            trained = {key for key, parameter in ours.named_parameters() if parameter.requires_grad}
            for key, parameter in theirs.named_parameters():
                parameter.requires_grad_(key in trained)
            inputs = batch(ours.config.image_token_id, ours.config.image_seq_length, supervised)
            runs = [(seconds(theirs.train(), inputs), seconds(ours.train(), inputs)) for _ in range(REPEATS)]
            them, us = (min(run[side][0] for run in runs) for side in (0, 1))
            losses = f"{runs[0][0][1]:.5f} {runs[0][1][1]:.5f}"
            table.add_row(name, f"{supervised} of 260", f"{them:.2f}", f"{us:.2f}", f"{them / us:.2f} x", losses)
    Console().print(table)


if __name__ == "__main__":
    main()
