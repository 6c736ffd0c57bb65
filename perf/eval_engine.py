"""Measure the speed of evaluation: the engine, compared with transformers' `generate` on one question at a time.

    OMP_NUM_THREADS=1 python perf/eval_engine.py                    # a minute on one core; prints a Markdown table
    OMP_NUM_THREADS=1 python perf/eval_engine.py --image-size 224 --pictures 6    # 196 tokens per image instead of 16

The questions have the form of POPE: 18 per image, with the answers Yes and No. A small model is first trained from
random weights for a few seconds, so that its answers end as answers to POPE do. All methods run in one process and must
give the same answers. The time of a method is the CPU time of the process, because the machine may be shared, and it is
the best of three runs.
"""

import argparse
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from tinyllava.config import ModelSpec
from tinyllava.console import output
from tinyllava.data.encode import expand
from tinyllava.data.labels import IGNORE
from tinyllava.data.sample import Message, Sample
from tinyllava.data.tokenizer import train_tokenizer
from tinyllava.eval.benchmarks import SHORT_ANSWER
from tinyllava.infer import Session
from tinyllava.infer.prompts import make_batches
from tinyllava.model.build import build, load_template

REPEATS = 3
COPIES = 20  # the memory test asks each question this many times
MAX_NEW_TOKENS = 16  # an answer has two or three tokens here
WARM_UP = 36  # questions before the first measurement, which would otherwise include one-time costs
THINGS = (
    *("dog", "cat", "chair", "table", "bottle", "car", "person", "cup", "bowl"),
    *("bench", "bird", "boat", "kite", "truck", "horse", "sheep", "bed", "clock"),
)
MODEL = {  # a million parameters and 16 tokens per image, like the model of quickstart-scratch
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

Method = Callable[[Session, list[Sample]], list[str]]


class Run(NamedTuple):
    """One run of a method: its CPU seconds and its answers."""

    seconds: float
    answers: list[str]


def write_images(folder: Path, count: int) -> list[str]:
    """Write `count` images of noise, dark and bright in turn, and return their paths."""
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        paths.append(str(folder / f"{number}.png"))
        noise = rng.integers(0, 64, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise + np.uint8(number % 2 * 190)).save(paths[-1])
    return paths


def build_samples(paths: list[str]) -> list[Sample]:
    """Return 18 questions per image in the words of POPE, with their answers.

    The dark images "show" the first nine things, and the bright ones the other nine.
    """
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


def train_to_answer(session: Session, samples: list[Sample], steps: int = 120, rows: int = 32) -> None:
    """Train the model of `session` until it answers with one word and ends its turn."""
    rng, model = random.Random(0), session.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    image_id = model.config.image_token_id
    for _ in range(steps):
        chosen = rng.sample(samples, rows)
        encoded = [session.template.encode(sample, session.tokenizer) for sample in chosen]
        expanded = [
            expand(np.array(row["input_ids"]), np.array(row["labels"]), image_id, session.processor.tokens_per_image)
            for row in encoded
        ]
        ids = pad_sequence([torch.tensor(ids) for ids, _ in expanded], True, session.pad_id)
        labels = pad_sequence([torch.tensor(labels) for _, labels in expanded], True, IGNORE)
        pixels = session.processor.to_pixels([Image.open(sample.images[0]) for sample in chosen])
        loss = model(input_ids=ids, pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def answer_one_at_a_time(session: Session, samples: list[Sample]) -> list[str]:
    """Answer each question alone with `generate`. Nothing is kept for the next one, so images are encoded again."""
    answers = []
    for sample in samples:
        session.images.cache.clear()
        # The private method is what a session itself calls where the engine cannot be used, such as for beam search.
        answers += session._generate([session.make_prompt(sample)], max_new_tokens=MAX_NEW_TOKENS)
    return answers


def answer_in_batches(session: Session, samples: list[Sample]) -> list[str]:
    """Answer batches of 64 questions of similar length with `generate`. Each image is encoded once."""
    prompts = {index: session.make_prompt(sample) for index, sample in enumerate(samples)}
    answers: dict[int, str] = {}
    for batch in make_batches(prompts, dict.fromkeys(prompts, MAX_NEW_TOKENS), 64):
        texts = session._generate([prompts[index] for index in batch], max_new_tokens=MAX_NEW_TOKENS)
        answers |= dict(zip(batch, texts, strict=True))
    return [answers[index] for index in range(len(samples))]


def answer_with_engine(session: Session, samples: list[Sample]) -> list[str]:
    """Answer as `tinyllava eval` does."""
    return session.generate(samples, max_new_tokens=MAX_NEW_TOKENS)


def run_method(method: Method, session: Session, samples: list[Sample]) -> Run:
    """Answer all questions with an empty image cache, and measure the CPU seconds."""
    session.images.cache.clear()
    start = time.process_time()
    answers = method(session, samples)
    return Run(time.process_time() - start, answers)


def measure_peak_memory() -> float:
    """Return the peak memory of this process until now, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


METHODS: dict[str, Method] = {
    "one at a time, `generate`": answer_one_at_a_time,
    "batches of 64, `generate`, each image encoded once": answer_in_batches,
    "the engine": answer_with_engine,
}


def parse_arguments() -> argparse.Namespace:
    """Parse the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=64, help="pixels per side; patches are 16 x 16")
    parser.add_argument("--pictures", type=int, default=24, help="the number of images, with 18 questions each")
    return parser.parse_args()


def print_runs(runs: dict[str, list[Run]], count: int) -> None:
    """Print a Markdown table with the best run of each method. `count`: the number of questions."""
    first, *_ = runs.values()
    base = min(run.seconds for run in first)
    output.print("| | CPU s | questions per CPU second | speed-up |\n|---|---|---|---|", markup=False)
    for name, repeats in runs.items():
        best = min(run.seconds for run in repeats)
        output.print(f"| {name} | {best:.2f} | {count / best:.0f} | {base / best:.1f} x |", markup=False)


def main() -> None:
    """Measure the time of each method, then the memory of the engine for more questions."""
    arguments = parse_arguments()
    MODEL["vision_tower"]["config"]["image_size"] = arguments.image_size
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        samples = build_samples(write_images(Path(folder), arguments.pictures))
        spec = ModelSpec.model_validate(MODEL)
        tokenizer = train_tokenizer(load_template(spec), samples, spec.llm.tokenizer.vocab_size)
        session = Session(build(spec, tokenizer))
        train_to_answer(session, samples)
        for method in METHODS.values():
            run_method(method, session, samples[:WARM_UP])
        runs = {
            name: [run_method(method, session, samples) for _ in range(REPEATS)] for name, method in METHODS.items()
        }
        expected, *others = (run.answers for repeats in runs.values() for run in repeats)
        if any(answers != expected for answers in others):
            raise SystemExit("the methods give different answers, so their times cannot be compared.")
        print_runs(runs, len(samples))
        counts = {answer: expected.count(answer) for answer in sorted(set(expected))}
        output.print(
            f"{len(samples)} questions on {arguments.pictures} images; all methods answer {counts}", soft_wrap=True
        )
        before = measure_peak_memory()
        for _ in session.generate_each(samples * COPIES, max_new_tokens=MAX_NEW_TOKENS):
            pass  # answers are not kept: only what the engine itself keeps is measured
        added = measure_peak_memory() - before
        output.print(f"{len(samples) * COPIES:,} questions: {added:.0f} MB above the peak of {before:.0f} MB before")


if __name__ == "__main__":
    main()
