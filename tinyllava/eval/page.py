"""Write the sample page of a task: some questions with their images and answers, in one HTML file.

The images are embedded, so the page needs no other file. You can mail it, or keep it with its results.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from tinyllava.data.images import open_image
from tinyllava.eval.benchmarks import Question
from tinyllava.eval.table import format_interval, format_percent

SIDE = 320  # pixels of an embedded image's longer side
SMALL = 128  # pixels; an image of up to this size is embedded without loss, and enlarged without blur

NOTE = (
    "Without the image: the same questions, asked without their images (blind baseline). Most frequent answer: how"
    " often it is right in the category (majority baseline). The red line in a bar is the better of these two"
    " baselines: only an accuracy above it is more than a guess from the question."
)
STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #6b7280; --card: #f6f7f9; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --dim: #9ca3af; --card: #1f2328; --good: #4ade80; --bad: #f87171; } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .75rem; }
p { margin: .25rem 0; color: var(--dim); }
table { border-collapse: collapse; margin-top: 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem 1.25rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td:first-child, th:first-child { text-align: left; }
.bar { display: block; position: relative; width: 10rem; height: .6rem; border-radius: .3rem; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: .3rem; background: #6366f1; }
.bar b { position: absolute; top: -.25rem; bottom: -.25rem; width: 2px; background: var(--bad); }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: .9rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
article img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #8882; }
article div { padding: .5rem .7rem .7rem; overflow-wrap: anywhere; }
.tag { font-size: .75rem; color: var(--dim); } .question { white-space: pre-line; }
@media (max-width: 40rem) { .bar { width: 3.5rem; } th, td { padding-right: .5rem; } }
.right { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); font-weight: 600; }
""".strip()


def write_sample_page(
    results: Mapping[str, Any],
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[str, Any]],
    path: Path,
    count: int = 24,
) -> None:
    """Write a page with a task's score table and `count` of its questions, right and wrong answers in turn.

    `results` is the task's entry in results.json and its scored `items`. `answers` are its records by question id.
    """
    by_id = {question.id: question for question in questions}
    picked = pick_items(results["items"], count)
    cards = [_render_card(by_id[item["id"]], item, answers[item["id"]]["text"]) for item in picked]
    title, score = escape(results["title"]), results["score"]
    number = "not scored here" if score is None else f"{score:.1f}"
    interval = f", 95 % interval {format_interval(results['interval'])}" if results["interval"] else ""
    path.write_text(
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {number}</title><style>{STYLE}</style></head><body>
<h1>{title}: {number}</h1>
<p>{escape(results["metric"])}, {results["n"]:,} questions{interval}</p>
{_render_table(results["categories"])}
<h2>{len(cards)} questions, with right and wrong answers in turn</h2>
<main>{"".join(cards)}</main>
</body></html>
""",
        encoding="utf-8",
    )


def pick_items(items: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Choose `count` items: from the categories in turn and, in each category, right and wrong answers in turn."""
    queues: dict[str, list[Mapping[str, Any]]] = {}
    for category in dict.fromkeys(item["category"] for item in items):
        group = [item for item in items if item["category"] == category]
        right = [item for item in group if (item["score"] or 0) >= 0.5]
        wrong = [item for item in group if (item["score"] or 0) < 0.5]
        turns = range(max(len(right), len(wrong)))
        queues[category] = [half[turn] for turn in turns for half in (right, wrong) if turn < len(half)]
    picked: list[Mapping[str, Any]] = []
    for turn in range(max(map(len, queues.values()), default=0)):
        picked += [queue[turn] for queue in queues.values() if turn < len(queue)]
    picked = picked[:count]
    return sorted(picked, key=lambda item: list(queues).index(item["category"]))


def _render_table(categories: Mapping[str, Mapping[str, Any]]) -> str:
    """Render the score table. The red line in a bar is the better baseline: without the image, or majority."""
    if not categories:
        return ""
    rows = []
    for name, row in categories.items():
        best = max(row["blind"] or 0.0, row["majority"] or 0.0)
        bar = f'<i style="width:{100 * row["accuracy"]:.1f}%"></i><b style="left:{100 * best:.1f}%"></b>'
        bar = f'<span class="bar">{bar}</span>'
        cells = (format_percent(row[key]) for key in ("accuracy", "blind", "majority"))
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{escape(name)}</td><td>{bar}</td>{numbers}<td>{row['n']:,}</td></tr>")
    names = ("category", "", "accuracy, %", "without the image, %", "most frequent answer, %", "questions")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    return f"<table>{head}{''.join(rows)}</table>\n<p>{NOTE}</p>"


def _render_card(question: Question, item: Mapping[str, Any], answer: str) -> str:
    images = "".join(f'<img alt="" loading="lazy" {_embed_image(image)}>' for image in question.images[:1])
    verdict = "" if item["score"] is None else "right" if item["score"] >= 0.5 else "wrong"
    mark = {"right": "✓ ", "wrong": "✗ "}.get(verdict, "")
    expected = ""
    if verdict == "wrong" and isinstance(question.answer, str | int):
        expected = f'<br><span class="tag">expected: {escape(str(question.answer))}</span>'
    return (
        f'<article>{images}<div><span class="tag">{escape(question.category)}</span>'
        f'<div class="question" style="padding:0">{escape(question.text)}</div>'
        f'<span class="{verdict}">{mark}{escape(answer) or "(no text)"}</span>{expected}</div></article>\n'
    )


def _embed_image(reference: str) -> str:
    """The attributes of an <img> element that holds the image itself."""
    image = open_image(reference)
    small = max(image.size) <= SMALL
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG" if small else "JPEG", quality=85)
    kind, style = ("png", ' style="image-rendering:pixelated"') if small else ("jpeg", "")
    return f'src="data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"{style}'
