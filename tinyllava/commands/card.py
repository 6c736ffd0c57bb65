"""The model card of an exported checkpoint: how to use it, what it is made of, how it was trained, what it scores."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tinyllava.config import PARTS
from tinyllava.data.template import Template
from tinyllava.eval.results import RESULTS
from tinyllava.eval.run import fingerprint
from tinyllava.model.layout import why_not_plain
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration

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
LICENCE = "Its licence follows from those of its parts and of its training data: add it before you publish."


def scores_of(given: Path, source: Path) -> dict[str, Any]:
    """The benchmarks of a `results.json` beside the checkpoint or its run, if it was made with just these weights."""
    for folder in dict.fromkeys((given, source, source.parent.parent)):
        if (folder / RESULTS).is_file():
            results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
            if results["made_with"]["checkpoint"] == fingerprint(source):
                return results["tasks"]
    return {}


def model_card(
    model: TinyLlavaForConditionalGeneration,
    template: Template,
    run: Mapping[str, Any],
    scores: Mapping[str, Any],
    name: str,
) -> ModelCard:
    """The card of `model`. `run`: the record of what trained it; `scores`: entries of results.json, by benchmark."""
    recipe = yaml.safe_load(run.get("recipe_yaml", "")) or {}
    reason = why_not_plain(model)
    if reason is None:
        loads, use = "It is plain `llava`: transformers loads it without further code.", PLAIN
    else:
        loads, use = f"It needs `pip install tinyllava-factory`, because {reason}.", OURS
    sections = [
        f"# {name}",
        f"A vision-language model made with TinyLLaVA Factory. {loads}",
        "## Use",
        use.format(name=name),
        "## Parts",
        _table(("part", "class", "from", "parameters"), _parts(model, template, recipe)),
    ]
    if recipe:
        rows = [_stage(stage, settings) for stage, settings in recipe["stages"].items()]
        trained = f"Recipe `{run['recipe']}`; checkpoint of stage `{run['stage']}`, step {run['step']:,}."
        head = ("stage", "data", "trained", "samples a step", "learning rate")
        whole = ("<details><summary>the recipe</summary>", f"```yaml\n{run['recipe_yaml'].strip()}\n```", "</details>")
        made = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        sections += ["## Training", trained, _table(head, rows), *whole, f"Made with {made}."]
    if scores:
        head = ("benchmark", "metric", "score", "questions", "scorer")
        rows = [
            (one["title"], one["metric"], f"{one['score']:.1f}", f"{one['n']:,}", one["scorer"])
            for one in scores.values()
            if one["score"] is not None
        ]
        sections += ["## Scores", _table(head, rows)]
    sections += ["## Licence", LICENCE]
    return ModelCard(f"---\n{_metadata(recipe, scores, name).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _metadata(recipe: Mapping[str, Any], scores: Mapping[str, Any], name: str) -> ModelCardData:
    parts = [recipe.get("model", {}).get(part) or {} for part in ("llm", "vision_tower")]
    bases = [identifier for part in parts if (identifier := part.get("name")) and _is_repository(identifier)]
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=task,
            dataset_name=one["title"],
            metric_type=one["metric"],
            metric_value=round(one["score"], 2),
        )
        for task, one in scores.items()
        if one["score"] is not None
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
    """Whether a recipe names a part on the Hub, and no directory."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _parts(
    model: TinyLlavaForConditionalGeneration, template: Template, recipe: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    wanted = recipe.get("model", {})
    ((connector, _),) = model.config.connector.items()
    modules = {"vision_tower": "vision_tower", "connector": "multi_modal_projector", "llm": "language_model"}
    rows = []
    for part, place in modules.items():
        module = model.get_submodule(f"model.{place}")
        origin = (wanted.get(part) or {}).get("name", "random weights") if recipe and part != "connector" else ""
        kind = f"`{connector}`" if part == "connector" else f"`{type(module).__name__}`"
        rows.append((part.replace("_", " "), kind, origin, f"{sum(p.numel() for p in module.parameters()):,}"))
    return [*rows, ("template", f"`{template.name}`", "", "")]


def _stage(name: str, stage: Mapping[str, Any]) -> tuple[str, ...]:
    data = ", ".join(f"`{source['path']}`" for source in stage["data"])
    tune = {"connector": {"tuning": {"full": {}}}, **stage.get("tune", {})}  # the defaults are not written
    tuned = [
        f"{part.replace('_', ' ')} {tuning}"
        for part in PARTS
        for tuning in tune.get(part, {"tuning": ["frozen"]})["tuning"]
        if tuning != "frozen"
    ]
    rate = stage.get("trainer", {}).get("learning_rate", "")
    return (name, data, ", ".join(tuned), str(stage.get("global_batch_size", "")), str(rate))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
