"""`tinyllava look RECIPE`: everything a run will do, before it does it. Nothing is trained and no weights are read.

For each stage: the parts and their learning rates, the data with its lengths, and real samples of the first batch with
the supervised tokens in green. At the end: what will be able to load the checkpoint.
"""

import math
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from tinyllava.config import Recipe
from tinyllava.data.spans import IGNORE
from tinyllava.data.streaming import StreamingDataset
from tinyllava.data.template import image_token_id
from tinyllava.data.tiles import image_tokens
from tinyllava.model.adapter import has_adapter
from tinyllava.model.layout import why_not_plain
from tinyllava.train.plan import Plan
from tinyllava.train.report import colour_tokens, length_histogram, parts_table
from tinyllava.train.stage import Setup, prepare
from tinyllava.train.stand_ins import stand_ins

SAMPLES = 4  # of the first micro-batch are shown


def look(recipe: Recipe, console: Console) -> None:
    """Show what training `recipe` would do. Raises UserError for whatever would stop it at its start."""
    for name in recipe.stages:
        setup = prepare(recipe, name, start=None, empty=True)
        console.print("", Rule(Text(f"stage {name}", style="bold"), align="left"))
        console.print(parts_table(setup.tuned, setup.args.learning_rate))
        if isinstance(setup.dataset, StreamingDataset):
            console.print(f"streamed data: no lengths are known; {setup.args.max_steps} steps")
            batch = list(islice(setup.dataset, SAMPLES))
        else:
            batch = look_at_data(setup, console)
        for item in batch[:SAMPLES]:
            show_item(setup, item, console)
        if len(batch) > SAMPLES:
            console.print(f"... and {len(batch) - SAMPLES} more in this micro-batch", style="dim")
    console.print("", Rule(Text("the checkpoint", style="bold"), align="left"))
    console.print(*where_it_runs(setup), sep="\n", highlight=False)


def look_offline(recipe: Recipe, console: Console) -> None:
    """The same with stand-ins for what this machine lacks, after a list of them."""
    with TemporaryDirectory() as folder:
        made, said = stand_ins(recipe, Path(folder))
        note = "their sizes, lengths and steps are not the recipe's" if said else "none are needed: everything is here"
        console.print(f"[bold]stand-ins[/]  {note}", highlight=False)
        for line in said:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        look(made, console)


def look_at_data(setup: Setup, console: Console) -> list[dict[str, Any]]:
    """Counts, lengths, padding and steps of a stage's data; returns the first micro-batch's samples."""
    dataset, args = setup.dataset, setup.args
    micro, batch_size = args.per_device_train_batch_size, setup.stage.global_batch_size
    plan = Plan(dataset.lengths, batch_size, micro, args.world_size, seed=args.data_seed)
    for source in dataset.sources:
        counts = f"{source['samples']:,} samples from {source['usable']:,} usable of {source['records']:,} records"
        console.print(f"{source['path']}: {counts}", highlight=False)
    for kind, entry in dataset.report.items():
        console.print(f"{kind}: {entry['count']:,} records ({', '.join(entry['ids'][:3])} ...)", style="yellow")
    if setup.validation is not None:
        console.print(f"validation: {len(setup.validation):,} samples", highlight=False)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * plan.steps_per_epoch)
    positions, supervised = int(dataset.lengths.sum()), int(dataset.supervised.sum())
    length = f"{args.num_train_epochs:g} epochs" if args.max_steps <= 0 else "max_steps"
    facts = {
        "optimiser steps": f"{steps:,} ({len(dataset):,} samples, {batch_size} a step, {length})",
        "a step": f"{plan.accumulation} micro-batches of {micro} on each of {args.world_size} device(s)",
        "supervised": f"{supervised:,} of {positions:,} positions ({100 * supervised / positions:.1f} %)",
        "padding": f"{100 * plan.padding():.1f} % of all positions",
        "longest": f"{int(dataset.lengths.max()):,} positions",
    }
    for name, fact in facts.items():
        console.print(f"{name:>16}  {fact}", highlight=False)
    console.print("\npositions a sample, and how many samples have them")
    console.print(
        Padding(length_histogram(dataset.lengths, width=min(40, console.width - 24)), (0, 2)), highlight=False
    )
    dataset.draft = None  # pictures at their real size
    return [dataset[index] for index in plan.micro_batches(plan.step(0, 0))[0][0] if index >= 0]


def show_item(setup: Setup, item: dict[str, Any], console: Console) -> None:
    """One sample: its pictures with their token counts, and its text with the supervised tokens in green."""
    tokenizer, ids, labels = setup.processor.tokenizer, item["input_ids"], item["labels"]
    known = not isinstance(setup.dataset, StreamingDataset)
    name = f"sample {setup.dataset.ids[item['index']] if known else item['index']}"
    learnt = int((labels[1:] != IGNORE).sum())
    console.print(f"\n[bold]{name}[/]  {len(ids)} positions, {learnt} supervised", highlight=False)
    counts = []
    if item["pixel_values"] is not None:
        side = item["pixel_values"].shape[-1]
        grids = item["image_grids"].tolist() if "image_grids" in item else [(1, 1)] * len(item["pixel_values"])
        counts = image_tokens(setup.processor.tokens_per_image, grids)
        sizes = [f"{image.width}x{image.height}" for image in setup.dataset.images(item["index"])] if known else []
        for number, ((rows, columns), count) in enumerate(zip(grids, counts, strict=True)):
            size = f"{sizes[number]} -> " if sizes else ""
            tiles = f" + {rows} x {columns} tiles" if rows * columns > 1 else ""
            console.print(f"  image {number + 1}: {size}{side}x{side} px{tiles}, {count} tokens", highlight=False)
    text = colour_tokens(ids.tolist(), labels.tolist(), tokenizer, image_token_id(tokenizer), counts)
    text.rstrip()
    console.print(Padding(text, (0, 2)))


def where_it_runs(setup: Setup) -> list[str]:
    """What can load the checkpoint that the last stage writes."""
    reason = why_not_plain(setup.model)
    if reason is None:
        lines = ["plain llava: loads in transformers and vLLM without our code"]
    else:
        lines = [
            f"not plain llava: {reason}.",
            "It loads in transformers after `import tinyllava`; vLLM cannot run it.",
        ]
    if has_adapter(setup.model):
        lines.append("It carries a LoRA adapter: `tinyllava export DIR --to merged` folds it into the weights.")
    return lines
