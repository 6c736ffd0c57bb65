"""Stand-ins: what a recipe names and this machine lacks, replaced by something tiny of the same kind.

    tinyllava look phi2-siglip-base --offline

A part that would have to be fetched becomes a random one of the same model_type, its tokenizer a small byte-level BPE,
a checkpoint one that is built and saved here, and data a few made-up records in LLaVA's layout. All else is the
recipe's own, and all code that builds, tunes and trains it is the real one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from tinyllava.config import DataSpec, ModelSpec, Recipe
from tinyllava.errors import UserError
from tinyllava.model import checkpoint
from tinyllava.model.build import build, default_template
from tinyllava.model.parts import config_of, located, tower_names
from tinyllava.train.stage import training_samples

# The family of a part, by how its Hub id, file or folder begins: those that the recipes in this package name.
LLMS = {"phi-2": "phi", "TinyLlama": "llama", "SmolLM2": "llama", "stablelm-2": "stablelm", "gemma-2b": "gemma"}
LLMS |= {"Qwen2": "qwen2", "Qwen3": "qwen3", "OpenELM": "openelm"}
TOWERS = {"clip-vit": "clip_vision_model", "siglip": "siglip_vision_model", "dinov2-": "dinov2"}
TOWERS |= {"quickstart": "siglip_vision_model"}
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
LLM = {**WIDTH, "num_key_value_heads": 4, "head_dim": 8}
TOWER = {**WIDTH, "image_size": 48, "patch_size": 4}  # 12 x 12 patches: space-to-depth by 2, 3, 4 or 6 fits
VOCABULARY = 512
RECORDS = 12
RELEASED = {  # what a missing `checkpoint` becomes: the parts of TinyLLaVA-Phi-2-SigLIP-3.1B
    "llm": "microsoft/phi-2",
    "vision_tower": "google/siglip-so400m-patch14-384",
    "connector": "mlp2x_gelu",
    "template": "phi",
}


def stand_ins(recipe: Recipe, folder: Path) -> tuple[Recipe, list[str]]:
    """The recipe with its stand-ins, whose files are written into `folder`, and a line about each of them.

    Raises UserError for a part that is not here and of no family known by its name.
    """
    made, said = recipe.model_dump(exclude_unset=True), []
    for name, stage in recipe.stages.items():
        own = made["stages"][name]
        for key in ("data", "validation"):
            specs = getattr(stage, key)
            for number, spec in enumerate(specs if isinstance(specs, list) else []):
                if not is_here(spec):
                    path = write_data(folder / name / f"{key}{number}", captions=stage.template == "pretrain")
                    own[key][number] = {"path": str(path), "weight": spec.weight}
                    said.append(f"{spec.path}: {RECORDS} made-up records")
        if own.get("trainer", {}).pop("deepspeed", None):
            said.append(f"stages.{name}.trainer.deepspeed: left out")
    source = recipe.model.checkpoint
    if source and not Path(source).is_dir():
        made["model"], lines = small_model(ModelSpec.model_validate(RELEASED), recipe)
        small = Recipe.model_validate(made)
        checkpoint.save(*build(small.model, lambda: training_samples(small), recipe.seed), folder / "checkpoint")
        kept = recipe.model.model_dump(exclude_unset=True, exclude={"lacking"})
        made["model"] = {**kept, "checkpoint": str(folder / "checkpoint")}
        said = [f"checkpoint {source}: a new one of the parts below", *lines, *said]
    elif not source:
        made["model"], lines = small_model(recipe.model, recipe)
        said = lines + said
    return Recipe.model_validate(made), said


def is_here(spec: DataSpec) -> bool:
    """Whether a source of data can be read as it is; the embedded one always can."""
    images = [spec.images] if isinstance(spec.images, str) else spec.images or []
    return spec.path.startswith("stamps:") or all(Path(path).exists() for path in (spec.path, *images))


def small_model(spec: ModelSpec, recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """The `model` section with stand-ins for the parts that are not here, and a line about each."""
    made, said = spec.model_dump(exclude_unset=True), []
    llm = spec.llm.name
    if llm is not None and not Path(located("llm", llm)).exists():
        fields = small("llm", family(llm, LLMS, "LLM"), depth(spec, recipe, "llm"))
        made["llm"] = {"config": fields, "tokenizer": {"vocab_size": VOCABULARY}}
        said.append(f"LLM {llm}: random {described(fields)}, with a BPE of {VOCABULARY} entries")
        if (spec.template or default_template(config_of("llm", fields))) == "native":
            made["template"] = "plain"
            said.append("template native: plain, for that tokenizer has no chat template")
    names = tower_names(spec.vision_tower.name) if spec.vision_tower.name else []
    if not all(Path(located("vision_tower", name)).is_dir() for name in names):
        layers = depth(spec, recipe, "vision_tower")
        towers = [small("vision_tower", family(name, TOWERS, "vision tower"), layers) for name in names]
        fields = towers[0] if len(towers) == 1 else {"model_type": "mof", "first": towers[0], "second": towers[1]}
        kept = spec.vision_tower.model_dump(exclude_unset=True, exclude={"name", "image_processor"})
        made["vision_tower"] = {**kept, "config": fields}
        said += [f"vision tower {name}: random {described(own)}" for name, own in zip(names, towers, strict=True)]
    return made, said


def family(name: str, known: Mapping[str, str], what: str) -> str:
    """The model_type of a part that is not here, by its name. Raises UserError for one that begins unlike all known."""
    for step in reversed(Path(name).parts):
        for start, model_type in known.items():
            if step.startswith(start):
                return model_type
    raise UserError(
        f"no stand-in is known for the {what} '{name}': its name begins with none of {', '.join(known)}."
        " Give a local directory, or look without --offline."
    )


def small(part: str, model_type: str, layers: int) -> dict[str, Any]:
    """The config of a tiny random part: the sizes above that the family knows."""
    sizes = {**(LLM if part == "llm" else TOWER), "num_hidden_layers": layers}
    known = config_of(part, {"model_type": model_type})
    return {"model_type": model_type, **{name: size for name, size in sizes.items() if hasattr(known, name)}}


def depth(spec: ModelSpec, recipe: Recipe, part: str) -> int:
    """Layers of a stand-in: as few as the feature layers and partial tuning allow."""
    tunings = [getattr(stage.tune, part).tuning for stage in recipe.stages.values()]
    trained = max(tuning.get("partial", {}).get("last", 1) for tuning in tunings)
    if part == "llm":
        return max(2, trained)
    layers = spec.vision_tower.feature_layer
    return trained + max(abs(layer) for layer in ([layers] if isinstance(layers, int) else layers))


def described(fields: Mapping[str, Any]) -> str:
    """A small config in words."""
    pixels = f", {fields['image_size']} px" if "image_size" in fields else ""
    return f"{fields['model_type']} of {fields['num_hidden_layers']} layers, {fields['hidden_size']} wide{pixels}"


def write_data(folder: Path, captions: bool) -> Path:
    """Records in LLaVA's layout, with their pictures: captions, or conversations of which one has no picture."""
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
        records.append({**record, "conversations": [{"from": who, "value": text} for who, text in turns]})
    path = folder / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
