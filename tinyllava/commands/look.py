"""`tinyllava look RECIPE`: show everything a run will do. It trains nothing. Weights are read of a `checkpoint:` only.

For each stage: the parts and their learning rates, the data with its lengths, and real samples of the first batch with
the supervised tokens in green. At the end: which libraries will be able to load the checkpoint.
"""

import math
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from tinyllava.checkpoint.layout import explain_not_plain
from tinyllava.checkpoint.saving import find_engines
from tinyllava.commands.parts_table import make_parts_table
from tinyllava.commands.render import colour_tokens, draw_histogram
from tinyllava.commands.stand_ins import make_stand_ins
from tinyllava.config import Recipe
from tinyllava.data.labels import IGNORE
from tinyllava.data.streaming import StreamingDataset
from tinyllava.data.template import image_token_id
from tinyllava.data.tiles import count_image_tokens
from tinyllava.engines import list_lines
from tinyllava.guards.shortage import estimate_stage
from tinyllava.train.plan import Plan
from tinyllava.train.stage import StageSetup, check_stages, prepare_stage

SAMPLES = 4  # shown of the first micro-batch


def look_at_recipe(recipe: Recipe, console: Console) -> None:
    """Show what training `recipe` would do. Raises UserError for everything that would stop its start."""
    check_stages(recipe, recipe.stages, trains=False)
    for name in recipe.stages:
        setup = prepare_stage(recipe, name, empty=True)
        console.print("", Rule(Text(f"stage {name}", style="bold"), align="left"))
        console.print(make_parts_table(setup.parts, setup.args.learning_rate))
        if setup.stage.supervised_turns == "last":
            console.print("supervised turns: only the last turn of each conversation is learned")
        if isinstance(setup.dataset, StreamingDataset):
            console.print(f"streamed data: the lengths are not known in advance; {setup.args.max_steps} steps")
            batch = list(islice(setup.dataset, SAMPLES))
        else:
            batch = look_at_data(setup, console)
        show_memory(setup, console)
        for item in batch[:SAMPLES]:
            show_sample(setup, item, console)
        if len(batch) > SAMPLES:
            console.print(f"... and {len(batch) - SAMPLES} more in this micro-batch", style="dim")
    console.print("", Rule(Text("the checkpoint", style="bold"), align="left"))
    console.print(*list_loaders(setup), sep="\n", highlight=False)


def look_at_stand_ins(recipe: Recipe, console: Console) -> None:
    """Show the same with tiny stand-ins for everything that is missing on this machine. Lists the stand-ins first."""
    with TemporaryDirectory() as folder:
        small, lines = make_stand_ins(recipe, Path(folder))
        note = "their sizes, lengths and steps are not the recipe's" if lines else "not needed: nothing is missing"
        console.print(f"[bold]stand-ins[/]  {note}", highlight=False)
        for line in lines:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        look_at_recipe(small, console)


def look_at_data(setup: StageSetup, console: Console) -> list[dict[str, Any]]:
    """Print counts, lengths, padding and steps of a stage's data; returns the samples of the first micro-batch."""
    dataset, args = setup.dataset, setup.args
    micro, batch_size = args.per_device_train_batch_size, setup.stage.global_batch_size
    plan = Plan(dataset.lengths, batch_size, micro, args.world_size, seed=args.data_seed, longest_first=True)
    for source in dataset.sources:
        counts = f"{source['samples']:,} samples from {source['usable']:,} usable of {source['records']:,} records"
        console.print(f"{source['path']}: {counts}", highlight=False, markup=False)
    for kind, entry in dataset.bad_records.to_dict().items():
        counts = f"{entry['count']:,} records ({', '.join(entry['ids'][:3])} ...)"
        console.print(f"{kind}: {counts}", style="yellow", markup=False)
    if setup.validation is not None:
        console.print(f"validation: {len(setup.validation):,} samples", highlight=False)
    steps_per_epoch = math.ceil(len(dataset) / batch_size)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    positions, supervised = int(dataset.lengths.sum()), int(dataset.supervised.sum())
    length = f"{args.num_train_epochs:g} epochs" if args.max_steps <= 0 else "max_steps"
    facts = {
        "optimiser steps": f"{steps:,} ({len(dataset):,} samples, {batch_size} per step, {length})",
        "each step": f"{plan.accumulation} micro-batches of {micro} on each of {args.world_size} device(s)",
        "supervised": f"{supervised:,} of {positions:,} positions ({100 * supervised / positions:.1f} %)",
        "padding": f"{100 * measure_padding(plan):.1f} % of all positions",
        "longest": f"{int(dataset.lengths.max()):,} positions",
    }
    for name, fact in facts.items():
        console.print(f"{name:>16}  {fact}", highlight=False)
    console.print("\npositions per sample, and how many samples have them")
    console.print(Padding(draw_histogram(dataset.lengths, width=min(40, console.width - 24)), (0, 2)), highlight=False)
    dataset.draft = None  # decode images at full size, because their sizes are shown
    return [dataset[entry.sample] for entry in next(plan.iterate_epoch(0))]


def show_memory(setup: StageSetup, console: Console) -> None:
    """Print how much memory the stage needs on each device, if the model runs on shapes alone."""
    try:
        memory = str(estimate_stage(setup.vlm.model, setup.dataset, setup.args))
    except RuntimeError:  # shapes that depend on data, as in a connector of the user's own
        memory = "not known: the shapes in this model depend on data"
    console.print(f"{'memory':>16}  {memory}", highlight=False)


def measure_padding(plan: Plan) -> float:
    """The share of padding in all positions of an epoch."""
    used = padded = 0
    for rank in range(plan.world_size):
        for batch in plan.iterate_epoch(0, rank):
            lengths = plan.lengths[[entry.sample for entry in batch]]
            used += int(lengths.sum())
            padded += int(lengths.max()) * len(batch)
    return 1.0 - used / padded if padded else 0.0


def show_sample(setup: StageSetup, item: dict[str, Any], console: Console) -> None:
    """Print one sample: its images with their token counts, and its text with the supervised tokens in green."""
    tokenizer, ids, labels = setup.vlm.processor.tokenizer, item["input_ids"], item["labels"]
    is_stream = isinstance(setup.dataset, StreamingDataset)
    name = f"sample {item['id'] if is_stream else setup.dataset.ids[item['index']]}"
    supervised = int((labels[1:] != IGNORE).sum())
    console.print(f"\n[bold]{escape(name)}[/]  {len(ids)} positions, {supervised} supervised", highlight=False)
    counts = []
    if item["pixel_values"] is not None:
        side = item["pixel_values"].shape[-1]
        grids = item["image_grids"].tolist() if "image_grids" in item else [(1, 1)] * len(item["pixel_values"])
        counts = count_image_tokens(setup.vlm.processor.tokens_per_image, grids)
        images = [] if is_stream else setup.dataset.load_images(item["index"])
        sizes = [f"{image.width}x{image.height}" for image in images]
        for number, ((rows, columns), count) in enumerate(zip(grids, counts, strict=True)):
            size = f"{sizes[number]} -> " if sizes else ""
            tiles = f" + {rows} x {columns} tiles" if rows * columns > 1 else ""
            console.print(f"  image {number + 1}: {size}{side}x{side} px{tiles}, {count} tokens", highlight=False)
    text = colour_tokens(ids.tolist(), labels.tolist(), tokenizer, image_token_id(tokenizer), counts)
    text.rstrip()
    console.print(Padding(text, (0, 2)))


def list_loaders(setup: StageSetup) -> list[str]:
    """List which programs can run the checkpoint that the last stage writes."""
    reason = explain_not_plain(setup.vlm.model)
    first = "plain llava: loads in transformers without our code" if reason is None else f"not plain llava: {reason}"
    return [first, *list_lines(find_engines(setup.vlm.model), "DIR")]
