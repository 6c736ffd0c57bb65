"""Pretrain a vision tower on stamps, so that there is one to start from where no hub can be reached.

    python -m tinyllava.train.tower runs/nano-tower
    tinyllava look quickstart model.vision_tower=runs/nano-tower

A contrast of patches with words, as CLIP contrasts pictures with captions: every patch of a picture that was composed a
moment ago is compared with all words of a sort (names, kinds, colours, letters; data/stamps/patches.py), and is to be
nearest to its own. One picture teaches 36 patches, and none has to guess which word of a caption is meant for it. The
words are thrown away afterwards: what is saved is an ordinary SigLIP tower.

Shapes: I pictures, P patches, S sorts of words, W words of all sorts, Dv tower width.
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

from tinyllava.console import output
from tinyllava.data.stamps import patches
from tinyllava.data.stamps.compose import Scene, render
from tinyllava.data.stamps.plan import SINGLE, WRITTEN, sample, word
from tinyllava.data.stamps.tiers import Tier, tier
from tinyllava.data.stamps.write import facts
from tinyllava.model.image_processor import llava_image_processor
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
PICTURES = 512_000
BATCH = 64
SIZES = (56, 128)  # pixels a side that pictures are composed at, before they are made the tower's size
MANIFEST = "manifest.json"
WHOLE = "tower_and_words.safetensors"  # to go on from; a recipe needs the other files only
CHECKED = 2_000  # pictures that accuracy is measured on: composed like the others, never trained on


class PatchWords(nn.Module):
    """A tower and an embedding for each word; the loss is the mean over sorts of the cross entropy of a patch's own
    word among all of its sort."""

    def __init__(self, tower: SiglipVisionModel, vocabulary: dict[str, tuple[str, ...]]):
        super().__init__()
        width = tower.config.hidden_size
        self.tower, self.norm = tower, nn.LayerNorm(width)
        self.words = nn.ModuleDict({sort: nn.Linear(width, len(known)) for sort, known in vocabulary.items()})

    def scores(self, pixels: Tensor) -> list[Tensor]:
        """uint8 [I, 3, H, W] -> for each sort [I * P, words of the sort]."""
        features = self.tower(pixels / 127.5 - 1, output_hidden_states=True).hidden_states[-1]
        features = self.norm(features).flatten(0, 1)
        return [words(features) for words in self.words.values()]

    def forward(self, pixels: Tensor, described: Tensor) -> dict[str, Tensor]:
        """`described` is [I, S, P]. A sort that no patch of the batch is told a word of counts nothing."""
        losses = [
            F.cross_entropy(found.float(), wanted, reduction="sum") / (wanted != patches.UNKNOWN).sum().clamp(min=1)
            for found, wanted in zip(self.scores(pixels), described.transpose(0, 1).flatten(1), strict=True)
        ]
        return {"loss": torch.stack(losses).sum()}


class Pictures(IterableDataset):
    """Pictures composed as they are asked for, no two alike: {"pixels", "described"}."""

    def __init__(self, tier: Tier, config: SiglipVisionConfig, part: str, count: int, written: float = WRITTEN):
        self.tier, self.side, self.part, self.count = tier, config.image_size, part, count
        self.written = written
        self.grid = config.image_size // config.patch_size
        self.vocabulary = patches.vocabulary(tier.concepts)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, self.count, step):
            scene = self.scene(Random(f"tower/{self.part}/{number}"))
            picture = render(scene).resize((self.side, self.side), Image.Resampling.BICUBIC)
            pixels = np.array(picture).transpose(2, 0, 1)
            yield {"pixels": pixels, "described": patches.described(scene, self.grid, self.vocabulary)}

    def scene(self, rng: Random) -> Scene:
        """Things on a background, or a word to read: one of the tier's, or an invented one."""
        tier = replace(self.tier, size=rng.randint(*SIZES), fill=rng.uniform(0.55, 0.9))
        if rng.random() >= self.written:
            return sample(tier, rng, single=SINGLE / 2)
        return word(tier, rng)


@torch.no_grad()
def accuracy(model: PatchWords, pictures: Pictures) -> dict[str, float]:
    """Percent of the patches that are told a word of a sort whose nearest word it is."""
    model.eval()
    right, told = torch.zeros(len(model.words)), torch.zeros(len(model.words))
    device = next(model.parameters()).device
    for batch in DataLoader(pictures, batch_size=BATCH):
        wanted = batch["described"].transpose(0, 1).flatten(1)
        for i, found in enumerate(model.scores(batch["pixels"].to(device))):
            known = wanted[i] > 0 if "nothing" in pictures.vocabulary[list(pictures.vocabulary)[i]] else wanted[i] >= 0
            right[i] += (found.argmax(-1).cpu() == wanted[i])[known].sum()
            told[i] += known.sum()
    return {sort: round(float(100 * r / t), 1) for sort, r, t in zip(pictures.vocabulary, right, told, strict=True)}


def pretrain(
    output: Path, count: int = PICTURES, written: float = WRITTEN, start: Path | None = None, seed: int = 0
) -> dict[str, float]:
    """Train a tower on `count` pictures, of which a share `written` are words to read; save it in `output` and return
    its accuracy for each sort of words. `start`: go on from what another run of this left there."""
    transformers.set_seed(seed)
    config, known = SiglipVisionConfig(**CONFIG), tier(TIER)
    gpu = torch.cuda.is_available()
    # On a CPU torch's fused attention takes longer in bf16 than all the rest of a step.
    tower = SiglipVisionModel._from_config(config, attn_implementation="sdpa" if gpu else "eager")
    model = PatchWords(tower, patches.vocabulary(known.concepts))
    if start:
        # Sorts of words that the earlier run was not told begin at random.
        model.load_state_dict(model.state_dict() | load_file(start / WHOLE))
    args = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=count // BATCH,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=500,
        weight_decay=0.05,
        adam_beta2=0.98,
        bf16=gpu or torch.cpu.get_capabilities().get("amx_bf16", False),
        use_cpu=not gpu,
        dataloader_num_workers=1,
        logging_steps=100,
        disable_tqdm=True,
        save_steps=1000,
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        seed=seed,
    )
    trainer = transformers.Trainer(
        model, args, train_dataset=Pictures(known, config, f"train{seed or ''}", count + BATCH, written)
    )
    trainer.train()
    found = accuracy(model, Pictures(known, config, "check", CHECKED))
    save_file(model.state_dict(), output / WHOLE)
    tower.to(torch.float16).save_pretrained(output)
    llava_image_processor(VisionTower.image_processor(config), config.image_size, "processor").save_pretrained(output)
    before = json.loads((start / MANIFEST).read_text(encoding="utf-8"))["runs"] if start else []
    runs = [*before, {"pictures": count, "written": written, "seed": seed}]
    manifest = {**facts(known), "runs": runs, "accuracy": found}
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--written", type=float, default=WRITTEN, help="the share of pictures with a word to read")
    parser.add_argument("--start", type=Path, metavar="DIR", help="go on from what an earlier run left there")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.start and not (options.start / WHOLE).is_file():
        parser.error(f"{options.start} has no {WHOLE}: give the output of an earlier run of this command.")
    output.print(pretrain(options.output, options.pictures, options.written, options.start, options.seed))
