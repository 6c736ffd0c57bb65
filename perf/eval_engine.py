"""Evaluation: questions on shared pictures through the engine, against one at a time through transformers' `generate`.

    OMP_NUM_THREADS=1 python perf/eval_engine.py                    # a minute on one core; prints a markdown table
    OMP_NUM_THREADS=1 python perf/eval_engine.py --image-size 224 --pictures 6    # 196 tokens a picture, not 16

A set in POPE's shape: 18 questions a picture, answered Yes or No. The model is trained from random weights for some
seconds, until its answers end as POPE's do. Process CPU seconds (machines are shared and noisy), best of the repeats,
all sides in one run; every side must give the same answers.
"""

import argparse
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from tinyllava.config import ModelSpec
from tinyllava.console import output
from tinyllava.data.encode import expand
from tinyllava.data.prompts import batches
from tinyllava.data.sample import Message, Sample
from tinyllava.eval.benchmarks import SHORT_ANSWER
from tinyllava.infer import Session
from tinyllava.model.build import build

REPEATS = 3
MORE = 20
NEW = 16  # tokens at most; an answer here has two or three
THINGS = (
    *("dog", "cat", "chair", "table", "bottle", "car", "person", "cup", "bowl"),
    *("bench", "bird", "boat", "kite", "truck", "horse", "sheep", "bed", "clock"),
)
MODEL = {  # a model of a million parameters that takes 16 tokens a picture, as the smallest quickstart has
    "llm": {
        "config": {
            "model_type": "llama",
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
            "tie_word_embeddings": True,
        },
        "tokenizer": {"vocab_size": 640},
    },
    "vision_tower": {
        "config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
        },
        "feature_layer": -1,
    },
    "connector": "mlp2x_gelu",
    "template": "plain",
}

Side = Callable[[Session, list[Sample]], list[str]]


def pictures(folder: Path, count: int) -> list[str]:
    """Files of noise, dark and bright in turns."""
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        paths.append(str(folder / f"{number}.png"))
        noise = rng.integers(0, 64, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise + np.uint8(number % 2 * 190)).save(paths[-1])
    return paths


def questions(paths: list[str]) -> list[Sample]:
    """18 for each picture in the words of POPE, with their answers: dark pictures show the first nine things."""
    return [
        Sample(
            [
                Message("user", f"<image>\nIs there a {thing} in the image?\n{SHORT_ANSWER}"),
                Message("assistant", "Yes" if (at < 9) == (number % 2 == 0) else "No"),
            ],
            [path],
        )
        for number, path in enumerate(paths)
        for at, thing in enumerate(THINGS)
    ]


def train(session: Session, samples: list[Sample], steps: int = 120, rows: int = 32) -> None:
    """Teach it to answer and to stop."""
    rng, model = random.Random(0), session.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    image_id = model.config.image_token_id
    for _ in range(steps):
        chosen = rng.sample(samples, rows)
        encoded = [session.template.encode(sample, session.tokenizer) for sample in chosen]
        made = [expand(*map(np.array, one.values()), image_id, session.processor.tokens_per_image) for one in encoded]
        ids, labels = (
            pad_sequence([torch.tensor(one[at]) for one in made], True, padding)
            for at, padding in ((0, session.pad_id), (1, -100))
        )
        pixels = session.processor.pixels([Image.open(sample.images[0]) for sample in chosen])
        loss = model(input_ids=ids, pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def one_at_a_time(session: Session, asked: list[Sample]) -> list[str]:
    """A question, its picture, its prompt, `generate`: nothing is kept for the next."""
    answers = []
    for sample in asked:
        session.pictures.kept.clear()
        answers += session._generate([session.prompt(sample)], max_new_tokens=NEW)
    return answers


def batched(session: Session, asked: list[Sample]) -> list[str]:
    """Batches of 64 by length through `generate`, every picture through the tower once."""
    prompts = {index: session.prompt(sample) for index, sample in enumerate(asked)}
    answers: dict[int, str] = {}
    for batch in batches(prompts, dict.fromkeys(prompts, NEW), 64):
        made = session._generate([prompts[index] for index in batch], max_new_tokens=NEW)
        answers |= dict(zip(batch, made, strict=True))
    return [answers[index] for index in range(len(asked))]


def engine(session: Session, asked: list[Sample]) -> list[str]:
    """What `tinyllava eval` does."""
    return session.generate(asked, max_new_tokens=NEW)


def seconds(side: Side, session: Session, asked: list[Sample]) -> tuple[float, list[str]]:
    """CPU seconds of a side that knows no picture yet, and its answers."""
    session.pictures.kept.clear()
    start = time.process_time()
    answers = side(session, asked)
    return time.process_time() - start, answers


def peak_memory() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure each side, and what more questions cost in memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=24)
    given = parser.parse_args()
    MODEL["vision_tower"]["config"]["image_size"] = given.image_size
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        asked = questions(pictures(Path(folder), given.pictures))
        session = Session(*build(ModelSpec.model_validate(MODEL), lambda: asked))
        train(session, asked)
        sides: dict[str, Side] = {
            "one at a time, `generate`": one_at_a_time,
            "batches of 64, `generate`, pictures once": batched,
            "the engine": engine,
        }
        for side in sides.values():
            seconds(side, session, asked[:36])  # warm
        runs = {name: [seconds(side, session, asked) for _ in range(REPEATS)] for name, side in sides.items()}
        alone, *_ = runs.values()
        wanted = alone[0][1]
        assert all(answers == wanted for made in runs.values() for _, answers in made), "the answers differ"
        base = min(time for time, _ in alone)
        output.print("| | CPU s | questions a CPU second | speed-up |\n|---|---|---|---|", markup=False)
        for name, made in runs.items():
            best = min(time for time, _ in made)
            output.print(f"| {name} | {best:.2f} | {len(asked) / best:.0f} | {base / best:.1f} x |", markup=False)
        counts = {answer: wanted.count(answer) for answer in sorted(set(wanted))}
        output.print(f"{len(asked)} questions on {given.pictures} pictures; all sides say {counts}", soft_wrap=True)
        before = peak_memory()
        for _ in session.generate_each(asked * MORE, max_new_tokens=NEW):
            pass
        output.print(
            f"{len(asked) * MORE:,} questions: {peak_memory() - before:.0f} MB above the {before:.0f} MB before"
        )


if __name__ == "__main__":
    main()
