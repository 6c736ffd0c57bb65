"""Write results.json and the files beside it: scores, their intervals, and the conditions of the evaluation.

    DIR/results.json               each task's score, interval and categories; model, data, prompts, scorer
        eval/TASK/items.jsonl      one line per question: prompt, answer, parsed answer, score
                  metrics.json     everything the official scorer reports, under its names
                  ...              files for servers and official tools

`tinyllava eval` writes them into the checkpoint's run, and `tinyllava score` writes them beside the answers.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava import atomic
from tinyllava.cache import digest
from tinyllava.data.sample import IMAGE_TOKEN
from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import ScoredItem, average, group_items
from tinyllava.eval.benchmarks._files import read_json_file
from tinyllava.eval.intervals import compute_intervals
from tinyllava.eval.tasks import Task
from tinyllava.provenance import get_versions

RESULTS = "results.json"
ITEMS = "items.jsonl"
LARGE = 200  # entries; a metric with more, such as a score for each question, is only in metrics.json


def build_entry(
    task: Task, result: Mapping[str, Any], prompts: Mapping[str, str], blind: Mapping[str, Any] | None, **facts: Any
) -> dict[str, Any]:
    """Build a task's entry in results.json.

    `prompts`: by question id. `blind`: the result without the images, or None. `facts`: further fields of the entry.
    """
    interval, category_intervals = compute_intervals(task.benchmark, result["items"])
    return {
        "title": task.title,
        "metric": result["metric"],
        "score": result["score"],
        "interval": interval,
        "blind": blind["score"] if blind else None,
        "unparsed": result["unparsed"],
        "categories": tabulate_categories(result["items"], blind["items"] if blind else None, category_intervals),
        "metrics": {name: value for name, value in result["metrics"].items() if not is_large(value)},
        "scorer": task.benchmark.scorer,
        "files": [f"eval/{task.name}/{name}" for name in result["files"]],
        "prompts": digest(*sorted(prompts.items())) if prompts else None,
        **facts,
    }


def load_results(path: Path) -> dict[str, Any]:
    """Load a results.json; returns one without tasks if it does not exist. Raises UserError for any other file."""
    results = read_json_file(path) if path.is_file() else {"tasks": {}}
    if not (isinstance(results, dict) and isinstance(results.get("tasks"), dict)):
        raise UserError(f"{path} is not a results file of tinyllava. Choose another --output.")
    return results


def save_entry(
    output: Path, conditions: Mapping[str, Any], task: Task, entry: dict[str, Any], **facts: Any
) -> dict[str, Any]:
    """Write a task's entry into `output`/results.json and return the whole content.

    Entries of another model are removed. `facts` are further fields, beside "tasks".
    """
    path = output / RESULTS
    before = load_results(path)
    results = before if before.get("made_with") == conditions else {"categories": {}, "tasks": {}}
    results |= {"made_with": conditions, **facts, "versions": get_versions()}
    results["tasks"][task.name] = entry
    if task.benchmark.fills_categories:
        results["categories"] = entry["categories"]
    atomic.write_text(path, json.dumps(results, indent=2) + "\n")
    return results


def save_details(folder: Path, result: Mapping[str, Any], prompts: Mapping[str, str]) -> None:
    """Write a task's items, all its metrics, and its files for servers into `folder`."""
    lines = [{**item, "prompt": prompts.get(item["id"], "")} for item in result["items"]]
    atomic.write_text(folder / ITEMS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    atomic.write_text(folder / "metrics.json", json.dumps(result["metrics"], indent=2) + "\n")
    for name, content in result["files"].items():
        atomic.write_text(folder / name, content if isinstance(content, str) else json.dumps(content))


def strip_placeholder(prompt: str) -> str:
    """A prompt without the image's placeholder, which some answers files put before it."""
    return prompt.replace(IMAGE_TOKEN, "").strip()


def tabulate_categories(
    items: Sequence[ScoredItem], blind_items: Sequence[ScoredItem] | None, intervals: Mapping[str, list[float]]
) -> dict[str, dict[str, Any]]:
    """{accuracy, interval, blind, majority, n} of each category, in the order of the test; {} if a server scores.

    blind, the accuracy without the image, is None if nothing was asked without the image. majority, the accuracy of
    the most frequent right answer, is None if a right answer is not one text or number.
    """
    groups, blind_groups = _group_by_category(items), _group_by_category(blind_items or [])
    table = {}
    for name, group in groups.items():
        golds = [item["gold"] for item in group]
        has_single_golds = all(isinstance(gold, str | int) for gold in golds)
        table[name or "all"] = {
            "accuracy": average(item["score"] for item in group),
            "interval": intervals.get(name),
            "blind": average(item["score"] for item in blind_groups[name]) if name in blind_groups else None,
            "majority": Counter(golds).most_common(1)[0][1] / len(golds) if has_single_golds else None,
            "n": len(group),
        }
    return table


def _group_by_category(items: Iterable[ScoredItem]) -> dict[str, list[ScoredItem]]:
    """The scored items by category; items that only a server can score are left out."""
    return group_items((item for item in items if item["score"] is not None), "category")


def is_large(value: Any) -> bool:
    """Whether a metric has too many entries for results.json."""
    return isinstance(value, dict | list) and len(value) > LARGE
