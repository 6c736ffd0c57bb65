"""The sample page: what was asked, shown and answered, in one HTML file that needs nothing else.

Pictures are embedded, so that the page can be mailed or kept with the results it belongs to.
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
from tinyllava.eval.table import percent, span

SIDE = 320  # pixels of an embedded picture's longer side
SMALL = 128  # pixels up to which a picture is kept exactly, and enlarged without blurring

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


def sample_page(
    results: Mapping[str, Any],
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[str, Any]],
    path: Path,
    count: int = 24,
) -> None:
    """Write `path`: a task's score table, and `count` of its questions with their pictures, as many right as wrong.

    `results` is the task's entry in results.json with its scored `items`; `answers` are its records by question id.
    """
    by_id = {question.id: question for question in questions}
    cards = [_card(by_id[item["id"]], item, answers[item["id"]]["text"]) for item in choose(results["items"], count)]
    title, score = escape(results["title"]), results["score"]
    number = "not scored here" if score is None else f"{score:.1f}"
    sure = f", 95 % interval {span(results['interval'])}" if results["interval"] else ""
    path.write_text(
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {number}</title><style>{STYLE}</style></head><body>
<h1>{title}: {number}</h1>
<p>{escape(results["metric"])}, {results["n"]:,} questions{sure}</p>
{_table(results["categories"])}
<h2>{len(cards)} of them, right and wrong answers in turn</h2>
<main>{"".join(cards)}</main>
</body></html>
""",
        encoding="utf-8",
    )


def choose(items: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` items, taking turns between categories and, inside each, between right and wrong answers."""
    queues: dict[str, list[Mapping[str, Any]]] = {}
    for category in dict.fromkeys(item["category"] for item in items):
        own = [item for item in items if item["category"] == category]
        right = [item for item in own if (item["score"] or 0) >= 0.5]
        wrong = [item for item in own if (item["score"] or 0) < 0.5]
        both = max(len(right), len(wrong))
        queues[category] = [pile[at] for at in range(both) for pile in (right, wrong) if at < len(pile)]
    chosen: list[Mapping[str, Any]] = []
    for turn in range(max(map(len, queues.values()), default=0)):
        chosen += [queue[turn] for queue in queues.values() if turn < len(queue)]
    chosen = chosen[:count]
    return sorted(chosen, key=lambda item: list(queues).index(item["category"]))


def _table(categories: Mapping[str, Mapping[str, Any]]) -> str:
    """The score table; the red line in a bar is the better one of blind and majority."""
    if not categories:
        return ""
    rows = []
    for name, row in categories.items():
        best = max(row["blind"] or 0.0, row["majority"] or 0.0)
        bar = f'<i style="width:{100 * row["accuracy"]:.1f}%"></i><b style="left:{100 * best:.1f}%"></b>'
        bar = f'<span class="bar">{bar}</span>'
        cells = (percent(row[key]) for key in ("accuracy", "blind", "majority"))
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{escape(name)}</td><td>{bar}</td>{numbers}<td>{row['n']:,}</td></tr>")
    head = "<tr><th></th><th></th><th>accuracy</th><th>blind</th><th>majority</th><th>n</th></tr>"
    note = "Blind: asked without the picture. Majority: always the most frequent answer. Red: the better of the two."
    return f"<table>{head}{''.join(rows)}</table>\n<p>{note}</p>"


def _card(question: Question, item: Mapping[str, Any], answer: str) -> str:
    pictures = "".join(f'<img alt="" loading="lazy" {_embedded(image)}>' for image in question.images[:1])
    verdict = "" if item["score"] is None else "right" if item["score"] >= 0.5 else "wrong"
    mark = {"right": "✓ ", "wrong": "✗ "}.get(verdict, "")
    wanted = ""
    if verdict == "wrong" and isinstance(question.answer, str | int):
        wanted = f'<br><span class="tag">expected: {escape(str(question.answer))}</span>'
    return (
        f'<article>{pictures}<div><span class="tag">{escape(question.category)}</span>'
        f'<div class="question" style="padding:0">{escape(question.text)}</div>'
        f'<span class="{verdict}">{mark}{escape(answer) or "(nothing)"}</span>{wanted}</div></article>\n'
    )


def _embedded(reference: str) -> str:
    """The attributes of an <img> that holds the picture itself."""
    image = open_image(reference)
    small = max(image.size) <= SMALL
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG" if small else "JPEG", quality=85)
    kind, style = ("png", ' style="image-rendering:pixelated"') if small else ("jpeg", "")
    return f'src="data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"{style}'
