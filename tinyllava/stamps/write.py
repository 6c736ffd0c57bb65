"""Write a tier as files: images, LLaVA records of every subset, and the held-out test.

    python -c "from tinyllava.stamps import prepare_tier; print(prepare_tier('stamps', 'tiny'))"

A folder with a manifest is always complete: it is written beside its place and renamed when the last file is in it. A
folder without a manifest is an incomplete copy, and is replaced.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tinyllava.atomic import write_directory
from tinyllava.cache import lock
from tinyllava.errors import UserError
from tinyllava.stamps import words
from tinyllava.stamps.compose import draw_scene
from tinyllava.stamps.plan import SUBSETS, PlannedRecord, list_answers, plan_records
from tinyllava.stamps.tiers import TIERS, Tier, get_tier

VERSION = 4  # of questions and boxes: raise it when either changes. Each version has a folder of its own
MANIFEST = "manifest.json"
QUALITY = 90  # of the JPEGs: 1.5 KB for an image of 64 px
Progress = Callable[[int, int], None]


def prepare_tier(
    root: str | Path, name: str = "tiny", seed: int = 0, progress: Progress | None = None, scale: float = 1.0
) -> Path:
    """Write tier `name` under `root` if it is not there yet, and return its folder.

    `scale` multiplies the number of records (for tests). `progress(done, total)` is called while images are written.
    Raises UserError for an unknown tier.
    """
    if name not in TIERS:
        raise UserError(f"unknown stamps tier {name!r}. Known: {', '.join(TIERS)}.")
    folder = Path(root) / (f"{name}-v{VERSION}-seed{seed}" + (f"-x{scale:g}" if scale != 1 else ""))
    if (folder / MANIFEST).is_file():
        return folder
    with lock(folder):
        if not (folder / MANIFEST).is_file():  # another process may have written it while this one waited
            with write_directory(folder) as partial:
                _write_tier(partial, get_tier(name), seed, scale, progress)
    return folder


def _write_tier(folder: Path, tier: Tier, seed: int, scale: float, progress: Progress | None) -> None:
    (folder / "images").mkdir()
    # Eight records at least, so that a small `scale` leaves no file empty.
    counts = {subset: max(8, round(getattr(tier, subset) * scale)) for subset in SUBSETS if getattr(tier, subset)}
    subsets = {subset: list(plan_records(tier, seed, subset, count)) for subset, count in counts.items()}
    records = [record for planned in subsets.values() for record in planned]
    _draw_images(folder, records, progress)
    files = {}
    for subset, planned in subsets.items():
        lines = [json.dumps(p.record, ensure_ascii=False) for p in planned]
        text = "\n".join(lines) + "\n" if subset == "test" else "[\n" + ",\n".join(lines) + "\n]\n"
        file = f"{subset}.jsonl" if subset == "test" else f"{subset}.json"
        files[file] = _write_records(folder / file, text, len(lines))
    lines = list(_list_boxes(records))
    files["boxes.jsonl"] = _write_records(folder / "boxes.jsonl", "\n".join(lines) + "\n", len(lines))
    manifest = describe_tier(tier) | {
        "seed": seed,
        "size": tier.size,
        "scale": scale,
        "pictures": sum(p.scene is not None for p in records),
        "files": files,
        "categories": list(list_answers(tier)),
    }
    text = json.dumps(manifest, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")


def describe_tier(tier: Tier) -> dict:
    """Return what a tier shows and what it never shows: the fields of a manifest that are the same for every seed."""
    has_words = "reading" in tier.kinds
    return {
        "dataset": "stamps",
        "version": VERSION,
        "tier": tier.name,
        "concepts": list(tier.concepts),
        "held_out": {
            "concepts": list(tier.held_out),
            "words": list(words.list_words(words.HELD_OUT)) if has_words else [],
            "fonts": list(words.HELD_OUT_FONTS) if has_words else [],
        },
    }


def _write_records(path: Path, text: str, records: int) -> dict:
    """Write one file and return its entry in the manifest."""
    path.write_text(text, encoding="utf-8", newline="\n")
    return {"records": records, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _list_boxes(records: list[PlannedRecord]) -> Iterator[str]:
    """Yield a JSON line per image with the box of each thing: for tests, and to study a wrong answer."""
    for planned in records:
        if scene := planned.scene:
            things = [
                {"name": t.concept.name, "box": t.box} | ({"tint": t.tint} if t.tint else {}) for t in scene.things
            ]
            things += [{"word": w.text, "font": w.font, "box": w.box} for w in scene.words]
            yield json.dumps({"image": planned.record["image"], "background": scene.background, "things": things})


def _draw_images(folder: Path, records: list[PlannedRecord], progress: Progress | None) -> None:
    """Draw every image in this process: 64 px take half a millisecond, so `tiny` takes ten seconds."""
    shown = [planned for planned in records if planned.scene]
    for done, planned in enumerate(shown, start=1):
        # No chroma subsampling: it would blur the colours of small things.
        draw_scene(planned.scene).save(folder / planned.record["image"], quality=QUALITY, subsampling=0)
        if progress and (done % 100 == 0 or done == len(shown)):
            progress(done, len(shown))
