"""Pretrain the small vision tower `nano` on stamps, for machines without access to a model hub.

    python -m tinyllava.stamps.nano_tower runs/nano-tower
    tinyllava look quickstart model.vision_tower=runs/nano-tower

The loss contrasts patches with words, as CLIP contrasts images with captions. Every patch of a newly composed image is
compared with all words of a sort (names, kinds, colours, letters: see patches.py), and must be nearest to its own word.
So one image teaches 36 patches, and no patch has to find its word in a caption. The word embeddings are needed for
pretraining only: the result is an ordinary SigLIP tower.

Shapes: I images, P patches, S sorts of words, W words of one sort.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import SiglipVisionConfig, SiglipVisionModel, TrainingArguments
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tinyllava.atomic import apply_umask, write_text
from tinyllava.console import output
from tinyllava.stamps import patches
from tinyllava.stamps.compose import Scene, draw_scene
from tinyllava.stamps.plan import SINGLE, WRITTEN, sample_scene, sample_word
from tinyllava.stamps.tiers import Tier, get_tier
from tinyllava.stamps.write import MANIFEST, describe_tier
from tinyllava.vision_towers.siglip import VisionTower

TIER = "pretrain"
CONFIG = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": 96,
    "patch_size": 16,
    "vision_use_head": False,
}
IMAGES = 512_000
BATCH = 64
SIZES = (56, 128)  # pixels a side: images are composed at a random size in this range, then resized to the tower's
WHOLE = "tower_and_words.safetensors"  # another run can start from it; a recipe uses only the other files
CHECKED = 2_000  # images that accuracy is measured on: composed like the others, never trained on


class PatchWords(nn.Module):
    """A tower and an embedding for each word.

    The loss is the cross entropy of a patch's word among all words of its sort, summed over the sorts.
    """

    def __init__(self, tower: SiglipVisionModel, vocabulary: dict[str, tuple[str, ...]]):
        super().__init__()
        width = tower.config.hidden_size
        self.tower = tower
        self.norm = nn.LayerNorm(width)
        self.words = nn.ModuleDict({sort: nn.Linear(width, len(words)) for sort, words in vocabulary.items()})

    def score_words(self, pixels: Tensor) -> list[Tensor]:
        """uint8 [I, 3, H, W] -> for each sort [I * P, W]."""
        features = self.tower(pixels / 127.5 - 1, output_hidden_states=True).hidden_states[-1]
        features = self.norm(features).flatten(0, 1)
        return [words(features) for words in self.words.values()]

    def forward(self, pixels: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the loss. `targets` is [I, S, P]; a sort that is UNKNOWN for every patch of the batch adds nothing."""
        losses = [
            F.cross_entropy(scores.float(), target, reduction="sum") / (target != patches.UNKNOWN).sum().clamp(min=1)
            for scores, target in zip(self.score_words(pixels), targets.transpose(0, 1).flatten(1), strict=True)
        ]
        return {"loss": torch.stack(losses).sum()}


class SceneImages(IterableDataset):
    """Images that are composed when they are needed, each one different: {"pixels", "targets"}."""

    def __init__(self, tier: Tier, config: SiglipVisionConfig, split: str, count: int, written: float = WRITTEN):
        self.tier = tier
        self.side = config.image_size
        self.split = split
        self.count = count
        self.written = written
        self.grid = config.image_size // config.patch_size
        self.vocabulary = patches.build_vocabulary(tier.concepts)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, self.count, step):
            scene = self.sample(Random(f"tower/{self.split}/{number}"))
            image = draw_scene(scene).resize((self.side, self.side), Image.Resampling.BICUBIC)
            pixels = np.array(image).transpose(2, 0, 1)
            yield {"pixels": pixels, "targets": patches.label_patches(scene, self.grid, self.vocabulary)}

    def sample(self, rng: Random) -> Scene:
        """Sample things on a background or, in a share `written`, a word to read."""
        tier = replace(self.tier, size=rng.randint(*SIZES), fill=rng.uniform(0.55, 0.9))
        if rng.random() >= self.written:
            return sample_scene(tier, rng, single=SINGLE / 2)
        return sample_word(tier, rng)


@torch.no_grad()
def measure_accuracy(model: PatchWords, images: SceneImages) -> dict[str, float]:
    """Return for each sort the percent of patches with a known word that are nearest to it.

    For names and letters, "nothing" does not count: most patches are empty, and they would hide the rest.
    """
    model.eval()
    right = torch.zeros(len(model.words))
    known = torch.zeros(len(model.words))
    device = next(model.parameters()).device
    for batch in DataLoader(images, batch_size=BATCH):
        targets = batch["targets"].transpose(0, 1).flatten(1)
        scores = model.score_words(batch["pixels"].to(device))
        for i, words in enumerate(images.vocabulary.values()):
            counted = targets[i] > 0 if "nothing" in words else targets[i] >= 0
            right[i] += (scores[i].argmax(-1).cpu() == targets[i])[counted].sum()
            known[i] += counted.sum()
    return {sort: round(float(100 * r / k), 1) for sort, r, k in zip(images.vocabulary, right, known, strict=True)}


def pretrain_tower(
    output: Path, count: int = IMAGES, written: float = WRITTEN, start: Path | None = None, seed: int = 0
) -> dict[str, float]:
    """Train a tower on `count` images, save it in `output` and return its accuracy for each sort of words.

    A share `written` of the images show a word to read. `start` is the output of an earlier run to start from.
    """
    transformers.set_seed(seed)
    config, tier = SiglipVisionConfig(**CONFIG), get_tier(TIER)
    # On a CPU torch's fused attention takes longer in bf16 than the rest of a step.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    tower = SiglipVisionModel._from_config(config, attn_implementation=attention)
    model = PatchWords(tower, patches.build_vocabulary(tier.concepts))
    if start:
        # Sorts of words that the earlier run did not have keep their random weights.
        model.load_state_dict(model.state_dict() | load_file(start / WHOLE))
    # A few more images than the steps use, so that the data never end before the last step.
    images = SceneImages(tier, config, f"train{seed or ''}", count + BATCH, written)
    trainer = transformers.Trainer(model, _build_arguments(output, count, seed), train_dataset=images)
    trainer.train()
    accuracy = measure_accuracy(model, SceneImages(tier, config, "check", CHECKED))
    save_file(model.state_dict(), output / WHOLE)
    _save_tower(tower, config, output)
    apply_umask(output)
    runs = json.loads((start / MANIFEST).read_text(encoding="utf-8"))["runs"] if start else []
    runs = [*runs, {"pictures": count, "written": written, "seed": seed}]
    manifest = {**describe_tier(tier), "runs": runs, "accuracy": accuracy}
    write_text(output / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return accuracy


def _build_arguments(output: Path, count: int, seed: int) -> TrainingArguments:
    has_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=count // BATCH,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=500,
        weight_decay=0.05,
        adam_beta2=0.98,
        bf16=has_gpu or torch.cpu.get_capabilities().get("amx_bf16", False),
        use_cpu=not has_gpu,
        dataloader_num_workers=1,
        logging_steps=100,
        disable_tqdm=True,
        save_steps=1000,
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        seed=seed,
    )


def _save_tower(tower: SiglipVisionModel, config: SiglipVisionConfig, output: Path) -> None:
    """Save the tower in float16 with its image processor, as a recipe's `vision_tower` expects them."""
    tower.to(torch.float16).save_pretrained(output)
    # crop_size is always set: LlavaProcessor counts an image's tokens from it even where nothing is cropped.
    square = {"height": config.image_size, "width": config.image_size}
    LlavaImageProcessorPil(**VisionTower.image_processor(config), crop_size=square).save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--pictures", type=int, default=IMAGES, help="the number of images to train on")
    parser.add_argument("--written", type=float, default=WRITTEN, help="the share of images with a word to read")
    parser.add_argument("--start", type=Path, metavar="DIR", help="start from the output of an earlier run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.start and not (options.start / WHOLE).is_file():
        parser.error(f"{options.start} has no {WHOLE}. Give the output of an earlier run of this command.")
    output.print(pretrain_tower(options.output, options.pictures, options.written, options.start, options.seed))
