"""results.json and what lies beside it: the scores, how sure they are, and how they were made.

    DIR/results.json               each task's score, interval and categories; model, data, prompts, scorer
        eval/TASK/items.jsonl      a question a line: prompt, answer, what was read out of it, its score
                  metrics.json     everything the official scorer reports, under its names
                  ...              files for servers and official tools

`tinyllava eval` writes them into the checkpoint's run, `tinyllava score` beside the answers.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava.data.cache import digest
from tinyllava.data.sample import IMAGE_TOKEN
from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import mean
from tinyllava.eval.benchmarks._files import read_json
from tinyllava.eval.intervals import intervals
from tinyllava.eval.tasks import Task
from tinyllava.train.record import versions

RESULTS = "results.json"
ITEMS = "items.jsonl"
LARGE = 200  # entries: a metric with more (a score for each question) is in metrics.json alone


def entry(
    task: Task, result: Mapping[str, Any], prompts: Mapping[str, str], unseen: Mapping[str, Any] | None, **facts: Any
) -> dict[str, Any]:
    """A task's entry in results.json. `prompts`: by question id; `unseen`: the result without pictures, if asked."""
    interval, by_category = intervals(task.benchmark, result["items"])
    return {
        "title": task.title,
        "metric": result["metric"],
        "score": result["score"],
        "interval": interval,
        "blind": unseen["score"] if unseen else None,
        "unparsed": result["unparsed"],
        "categories": categories(result["items"], unseen["items"] if unseen else None, by_category),
        "metrics": {name: value for name, value in result["metrics"].items() if not is_large(value)},
        "scorer": task.benchmark.SCORER,
        "files": [f"eval/{task.name}/{name}" for name in result["files"]],
        "prompts": digest(*sorted(prompts.items())) if prompts else None,
        **facts,
    }


def load(path: Path) -> dict[str, Any]:
    """What a results.json holds; {} if it is not there. Raises UserError for a file that is something else."""
    results = read_json(path) if path.is_file() else {"tasks": {}}
    if not (isinstance(results, dict) and isinstance(results.get("tasks"), dict)):
        raise UserError(f"{path} is no results file of ours. Choose another --output.")
    return results


def save(output: Path, made: Mapping[str, Any], task: Task, one: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Write a task's entry into `output`/results.json; returns all of it. Entries of another model do not stay.

    `facts` are kept beside the tasks.
    """
    path = output / RESULTS
    before = load(path)
    results = before if before.get("made_with") == made else {"categories": {}, "tasks": {}}
    results |= {"made_with": made, **facts, "versions": versions()}
    results["tasks"][task.name] = one
    if task.name == "stamps":
        results["categories"] = one["categories"]
    write(path, json.dumps(results, indent=2) + "\n")
    return results


def save_details(folder: Path, result: Mapping[str, Any], prompts: Mapping[str, str]) -> None:
    """Write a task's items, metrics and upload files into its folder."""
    lines = [{**item, "prompt": prompts.get(item["id"], "")} for item in result["items"]]
    write(folder / ITEMS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write(folder / "metrics.json", json.dumps(result["metrics"], indent=2) + "\n")
    for name, content in result["files"].items():
        write(folder / name, content if isinstance(content, str) else json.dumps(content))


def write(path: Path, text: str) -> None:
    """Write a file whole: beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def bare(prompt: str) -> str:
    """A prompt as a benchmark has it: without the placeholder that some answers files put before it."""
    return prompt.replace(IMAGE_TOKEN, "").strip()


def categories(
    items: Sequence[Mapping[str, Any]],
    unseen: Sequence[Mapping[str, Any]] | None,
    sure: Mapping[str, list[float]],
) -> dict[str, dict[str, Any]]:
    """{accuracy, interval, blind, majority, n} of each category, in the order of the test; none for a server's tasks.

    blind is None where it was not asked, majority where answers are no single text or number.
    """
    groups, blind = _by_category(items), _by_category(unseen or [])
    table = {}
    for name, group in groups.items():
        golds = [item["gold"] for item in group]
        plain = all(isinstance(gold, str | int) for gold in golds)
        table[name or "all"] = {
            "accuracy": mean(item["score"] for item in group),
            "interval": sure.get(name),
            "blind": mean(item["score"] for item in blind[name]) if name in blind else None,
            "majority": Counter(golds).most_common(1)[0][1] / len(golds) if plain else None,
            "n": len(group),
        }
    return table


def _by_category(items: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        if item["score"] is not None:
            groups.setdefault(item["category"], []).append(item)
    return groups


def is_large(value: Any) -> bool:
    """Whether a metric is as long as the benchmark."""
    return isinstance(value, dict | list) and len(value) > LARGE
