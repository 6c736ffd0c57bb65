"""Build the model card of an exported checkpoint: how to use it, its parts, its training and its scores."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tinyllava.checkpoint.layout import explain_not_plain
from tinyllava.config import PARTS
from tinyllava.eval.results import RESULTS
from tinyllava.eval.run import hash_checkpoint
from tinyllava.model.vlm import VLM
from tinyllava.secrets import hide_secrets
from tinyllava.yaml_faults import parse_yaml

PLAIN = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}")
model = AutoModelForImageTextToText.from_pretrained("{name}")
content = [{{"type": "image", "path": "picture.jpg"}}, {{"type": "text", "text": "What is in the picture?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
OURS = """```python
import tinyllava

model = tinyllava.load("{name}")
print(model.chat("What is in the picture?", "picture.jpg"))
```"""
LICENCE = "The licence depends on those of the parts and of the training data. Add it before you publish the model."


def find_scores(run: Path, source: Path) -> dict[str, Any]:
    """Find the benchmark entries in a `results.json` of the checkpoint `source` or its run.

    Returns {} if there is none, or if it belongs to other weights.
    """
    # `source` is RUN/STAGE/final, so the run is two levels up.
    for folder in dict.fromkeys((run, source, source.parent.parent)):
        if (folder / RESULTS).is_file():
            results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
            if results["made_with"]["checkpoint"] == hash_checkpoint(source):
                return results["tasks"]
    return {}


def make_model_card(vlm: VLM, run: Mapping[str, Any], scores: Mapping[str, Any], name: str) -> ModelCard:
    """Make the card of a model. run: the record of its training. scores: entries of results.json by benchmark."""
    recipe = parse_yaml(run.get("recipe_yaml", ""), "the recipe in the record") or {}
    reason = explain_not_plain(vlm.model)
    if reason is None:
        note, code = "It is plain `llava`: transformers loads it without more code.", PLAIN
    else:
        note, code = f"It requires `pip install tinyllava-factory`, because {reason}.", OURS
    sections = [
        f"# {name}",
        f"A vision-language model made with TinyLLaVA Factory. {note}",
        "## Use",
        code.format(name=name),
        "## Parts",
        _make_table(("part", "class", "from", "parameters"), _list_parts(vlm, recipe)),
    ]
    if recipe:
        rows = [_describe_stage(stage, settings) for stage, settings in recipe["stages"].items()]
        trained = f"Recipe `{run['recipe']}`; checkpoint of stage `{run['stage']}`, step {run['step']:,}."
        head = ("stage", "data", "trained", "samples per step", "learning rate")
        details = (
            "<details><summary>the recipe</summary>",
            f"```yaml\n{hide_secrets(run['recipe_yaml']).strip()}\n```",
            "</details>",
        )
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        sections += ["## Training", trained, _make_table(head, rows), *details, f"Made with {versions}."]
    if scores:
        head = ("benchmark", "metric", "score", "questions", "scorer")
        rows = [
            (entry["title"], entry["metric"], f"{entry['score']:.1f}", f"{entry['n']:,}", entry["scorer"])
            for entry in scores.values()
            if entry["score"] is not None
        ]
        sections += ["## Scores", _make_table(head, rows)]
    sections += ["## Licence", LICENCE]
    return ModelCard(f"---\n{_make_metadata(recipe, scores, name).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _make_metadata(recipe: Mapping[str, Any], scores: Mapping[str, Any], name: str) -> ModelCardData:
    parts = [recipe.get("model", {}).get(part) or {} for part in ("llm", "vision_tower")]
    bases = [identifier for part in parts if (identifier := part.get("name")) and _is_repository(identifier)]
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=task,
            dataset_name=entry["title"],
            metric_type=entry["metric"],
            metric_value=round(entry["score"], 2),
        )
        for task, entry in scores.items()
        if entry["score"] is not None
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["llava", "tinyllava"],
        base_model=bases or None,
        model_name=name,
        eval_results=results or None,
    )


def _is_repository(name: str) -> bool:
    """Whether `name` is a repository on the Hub and not a local directory."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _list_parts(vlm: VLM, recipe: Mapping[str, Any]) -> list[tuple[str, ...]]:
    spec = recipe.get("model", {})
    ((connector, _),) = vlm.model.config.connector.items()
    modules = {"vision_tower": "vision_tower", "connector": "multi_modal_projector", "llm": "language_model"}
    rows = []
    for part, place in modules.items():
        module = vlm.model.get_submodule(f"model.{place}")
        origin = (spec.get(part) or {}).get("name", "random weights") if recipe and part != "connector" else ""
        kind = f"`{connector}`" if part == "connector" else f"`{type(module).__name__}`"
        rows.append((part.replace("_", " "), kind, origin, f"{sum(p.numel() for p in module.parameters()):,}"))
    return [*rows, ("template", f"`{vlm.template.name}`", "", "")]


def _describe_stage(name: str, stage: Mapping[str, Any]) -> tuple[str, ...]:
    data = ", ".join(f"`{source['path']}`" for source in stage["data"])
    tune = {"connector": {"tuning": {"full": {}}}, **stage.get("tune", {})}  # the recipe leaves out defaults
    tuned = [
        f"{part.replace('_', ' ')} {tuning}"
        for part in PARTS
        for tuning in tune.get(part, {"tuning": ["frozen"]})["tuning"]
        if tuning != "frozen"
    ]
    rate = stage.get("trainer", {}).get("learning_rate", "")
    return (name, data, ", ".join(tuned), str(stage.get("global_batch_size", "")), str(rate))


def _make_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
