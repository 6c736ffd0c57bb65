"""Make stand-ins: replace what is missing on this machine by something tiny of the same kind.

    tinyllava look phi2-siglip-base --offline

A part that would have to be downloaded is replaced by a random one of the same model_type, with a small byte-level BPE
as its tokenizer. A checkpoint is replaced by one that is built and saved here. Data are replaced by a few made-up
records in LLaVA's layout. Everything else is the recipe's, and the same code builds, tunes and trains the model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from tinyllava import checkpoint
from tinyllava.config import DataSpec, ModelSpec, Recipe
from tinyllava.errors import UserError
from tinyllava.find import locate_part
from tinyllava.model.build import build, get_default_template
from tinyllava.model.parts import make_part_config
from tinyllava.train.start import make_tokenizer
from tinyllava.vision_towers import join_tower_configs, split_tower_name

# The model_type of a part by the beginning of its Hub id, file or folder. These are the parts in the package's recipes.
LLMS = {"phi-2": "phi", "TinyLlama": "llama", "SmolLM2": "llama", "stablelm-2": "stablelm", "gemma-2b": "gemma"}
LLMS |= {"Qwen2": "qwen2", "Qwen3": "qwen3", "OpenELM": "openelm"}
TOWERS = {"clip-vit": "clip_vision_model", "siglip": "siglip_vision_model", "dinov2-": "dinov2"}
TOWERS |= {"quickstart": "siglip_vision_model"}
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
LLM_SIZES = {**WIDTH, "num_key_value_heads": 4, "head_dim": 8}
TOWER_SIZES = {**WIDTH, "image_size": 48, "patch_size": 4}  # 12 x 12 patches: space-to-depth by 2, 3, 4 or 6 fits
VOCABULARY = 512
RECORDS = 12
RELEASED = {  # a missing `checkpoint` gets the parts of TinyLLaVA-Phi-2-SigLIP-3.1B
    "llm": "microsoft/phi-2",
    "vision_tower": "google/siglip-so400m-patch14-384",
    "connector": "mlp2x_gelu",
    "template": "phi",
}


def make_stand_ins(recipe: Recipe, folder: Path) -> tuple[Recipe, list[str]]:
    """Make the recipe with stand-ins, and a line about each of them. Their files are written into `folder`.

    Raises UserError for a missing part whose family cannot be guessed from its name.
    """
    fields = recipe.model_dump(exclude_unset=True)
    lines = []
    for name in recipe.stages:
        lines += replace_data(recipe, name, fields["stages"][name], folder)
        if fields["stages"][name].get("trainer", {}).pop("deepspeed", None):
            lines.append(f"stages.{name}.trainer.deepspeed: left out")
    source = recipe.model.checkpoint
    if source and not Path(locate_part("model", source)).is_dir():
        fields["model"], part_lines = make_small_model(ModelSpec.model_validate(RELEASED), recipe)
        small = Recipe.model_validate(fields)
        checkpoint.save(build(small.model, make_tokenizer(small), recipe.seed), folder / "checkpoint")
        # `lacking` is for an original checkpoint, and the new one is an ordinary one.
        unchanged = recipe.model.model_dump(exclude_unset=True, exclude={"lacking"})
        fields["model"] = {**unchanged, "checkpoint": str(folder / "checkpoint")}
        lines = [f"checkpoint {source}: a new one of the parts below", *part_lines, *lines]
    elif not source:
        fields["model"], part_lines = make_small_model(recipe.model, recipe)
        lines = part_lines + lines
    return Recipe.model_validate(fields), lines


def replace_data(recipe: Recipe, name: str, fields: dict[str, Any], folder: Path) -> list[str]:
    """Replace missing data sources in the fields of stage `name`; returns a line about each."""
    stage, lines = recipe.stages[name], []
    for key in ("data", "validation"):
        specs = getattr(stage, key)
        for number, spec in enumerate(specs if isinstance(specs, list) else []):
            if not is_available(spec):
                path = write_records(folder / name / f"{key}{number}", captions=stage.template == "pretrain")
                fields[key][number] = {"path": str(path), "weight": spec.weight}
                lines.append(f"{spec.path}: {RECORDS} made-up records")
    return lines


def is_available(spec: DataSpec) -> bool:
    """Whether a data source can be read on this machine. The embedded stamps always can."""
    images = [spec.images] if isinstance(spec.images, str) else spec.images or []
    return spec.path.startswith("stamps:") or all(Path(path).exists() for path in (spec.path, *images))


def make_small_model(spec: ModelSpec, recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """Make the `model` section with stand-ins for missing parts, and a line about each."""
    fields, lines = spec.model_dump(exclude_unset=True), []
    llm = spec.llm.name
    if llm is not None and not Path(locate_part("llm", llm)).exists():
        config = make_small_config("llm", guess_family(llm, LLMS, "LLM"), count_layers(spec, recipe, "llm"))
        fields["llm"] = {"config": config, "tokenizer": {"vocab_size": VOCABULARY}}
        lines.append(f"LLM {llm}: random {describe_config(config)}, with a BPE of {VOCABULARY} entries")
        if (spec.template or get_default_template(make_part_config("llm", config))) == "native":
            fields["template"] = "plain"
            lines.append("template native: plain, because that tokenizer has no chat template")
    names = split_tower_name(spec.vision_tower.name) if spec.vision_tower.name else []
    if not all(Path(locate_part("vision_tower", name)).is_dir() for name in names):
        layers = count_layers(spec, recipe, "vision_tower")
        families = [guess_family(name, TOWERS, "vision tower") for name in names]
        towers = [make_small_config("vision_tower", family, layers) for family in families]
        unchanged = spec.vision_tower.model_dump(exclude_unset=True, exclude={"name", "image_processor"})
        fields["vision_tower"] = {**unchanged, "config": join_tower_configs(spec.vision_tower.name, towers)}
        for name, tower in zip(names, towers, strict=True):
            lines.append(f"vision tower {name}: random {describe_config(tower)}")
    return fields, lines


def guess_family(name: str, known: Mapping[str, str], title: str) -> str:
    """Guess the model_type of a missing part from its name. Raises UserError for an unknown name."""
    for step in reversed(Path(name).parts):
        for start, model_type in known.items():
            if step.startswith(start):
                return model_type
    raise UserError(
        f"no stand-in is known for the {title} '{name}'. Known names begin with {', '.join(known)}."
        " Give a local directory, or look without --offline."
    )


def make_small_config(part: str, model_type: str, layers: int) -> dict[str, Any]:
    """Make the config of a tiny random part: the sizes above, for the fields that the family has."""
    sizes = {**(LLM_SIZES if part == "llm" else TOWER_SIZES), "num_hidden_layers": layers}
    config = make_part_config(part, {"model_type": model_type})
    return {"model_type": model_type, **{name: size for name, size in sizes.items() if hasattr(config, name)}}


def count_layers(spec: ModelSpec, recipe: Recipe, part: str) -> int:
    """Return the layers of a stand-in: as few as the feature layers and partial tuning allow."""
    tunings = [getattr(stage.tune, part).tuning for stage in recipe.stages.values()]
    trained = max(tuning.get("partial", {}).get("last", 1) for tuning in tunings)
    if part == "llm":
        return max(2, trained)
    layers = spec.vision_tower.feature_layer
    return trained + max(abs(layer) for layer in ([layers] if isinstance(layers, int) else layers))


def describe_config(fields: Mapping[str, Any]) -> str:
    """Describe a small config in words."""
    pixels = f", {fields['image_size']} px" if "image_size" in fields else ""
    return f"{fields['model_type']} of {fields['num_hidden_layers']} layers, width {fields['hidden_size']}{pixels}"


def write_records(folder: Path, captions: bool) -> Path:
    """Write records in LLaVA's layout with their images: captions, or conversations of which one has no image."""
    folder.mkdir(parents=True)
    records = []
    for number in range(RECORDS):
        colour = ("red", "green", "blue", "yellow")[number % 4]
        Image.new("RGB", (60, 40 + number), colour).save(folder / f"{number}.png")
        record = {"id": str(number), "image": f"{number}.png"}
        turns = [("human", "<image>\nWhat is in the picture?"), ("gpt", f"A {colour} wall, {number} bricks high.")]
        if not captions:
            turns += [("human", "Which colour has it?"), ("gpt", colour)]
        if not captions and number == 0:
            record, turns = {"id": "0"}, [("human", "What is grass like?"), ("gpt", "Green.")]
        records.append({**record, "conversations": [{"from": speaker, "value": text} for speaker, text in turns]})
    path = folder / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
