"""Start a stage: build the recipe's parts, load the checkpoint that it names, or load that of the stage before.

It also finds the files on disk that hold exactly the weights of the start. The checkpoints of the stage link them.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tinyllava import atomic, checkpoint
from tinyllava.checkpoint.adapter import has_adapter, merge_adapter
from tinyllava.config import Recipe, TokenizerSpec
from tinyllava.console import is_main_process
from tinyllava.data.sample import Sample
from tinyllava.data.sources import open_source
from tinyllava.data.tokenizer import train_tokenizer
from tinyllava.find import find_checkpoint
from tinyllava.model.build import add_tokens, build, load_template
from tinyllava.model.parts import DTYPES
from tinyllava.model.vlm import VLM
from tinyllava.record import find_part_files
from tinyllava.train.sharding import forget_engine
from tinyllava.tuning import Selection

WeightFiles = dict[str, list[Path]]  # {part: the files that hold exactly its weights}


def start_run(recipe: Recipe, empty: bool = False) -> VLM:
    """Build or load the model that the first stage starts from. With `empty`, the recipe's parts get no weights."""
    model = recipe.model
    if model.checkpoint is None:
        return build(model, make_tokenizer(recipe), recipe.seed, empty)
    source, dtype = find_checkpoint(model.checkpoint), DTYPES[model.dtype]
    vlm = checkpoint.load(source, dtype, **model.lacking.model_dump(exclude_none=True))
    add_tokens(vlm, model.add_tokens)
    return vlm


def start_stage(recipe: Recipe, previous: Path | None, empty: bool = False) -> tuple[VLM, WeightFiles]:
    """Load the model that a stage starts from, and find the files that hold exactly its weights.

    previous: the checkpoint of the stage before. Its adapter is merged, because this stage has its own tuning. There
    are no files if the weights were made, merged or converted in memory.
    """
    forget_engine()
    vlm = start_run(recipe, empty) if previous is None else checkpoint.load(previous)
    if previous is None and recipe.model.checkpoint is None:
        return vlm, {}
    if has_adapter(vlm.model):
        merge_adapter(vlm.model)
        return vlm, {}
    converted = previous is None and (recipe.model.dtype != "auto" or bool(recipe.model.add_tokens))
    return vlm, {} if converted else find_part_files(previous or find_checkpoint(recipe.model.checkpoint))


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast | None:
    """Train the tokenizer of a recipe on its training data. None if the LLM has a tokenizer."""
    llm = recipe.model.llm
    if not isinstance(llm.tokenizer, TokenizerSpec):
        return None
    texts, size = read_training_samples(recipe), llm.tokenizer.vocab_size
    return train_tokenizer(load_template(recipe.model), texts, size, recipe.model.add_tokens)


def read_training_samples(recipe: Recipe) -> Iterator[Sample]:
    """The samples of all data sources of all stages, one of each source in turn."""
    streams = [open_source(spec).iterate_samples() for stage in recipe.stages.values() for spec in stage.data]
    for row in itertools.zip_longest(*streams):
        yield from (sample for sample in row if sample is not None)


def keep_unquantised(vlm: VLM, selections: Mapping[str, Selection], files: WeightFiles, directory: Path) -> WeightFiles:
    """Files with the weights of all parts that will be quantised: `files`, or those of a checkpoint that is saved now.

    Quantised weights cannot be converted back, and every checkpoint must hold the unquantised weights.
    """
    quantised = [part for part, selection in selections.items() if selection.quantised]
    if all(files.get(part) for part in quantised):
        return files
    if is_main_process() and not checkpoint.is_whole(directory):
        with atomic.write_directory(directory) as partial:
            checkpoint.save(vlm, partial)
    return find_part_files(directory)
