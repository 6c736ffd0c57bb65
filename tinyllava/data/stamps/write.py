"""Write a tier as files: pictures, LLaVA records for both stages, a validation part and the held-out test.

    python -c "from tinyllava.data.stamps import prepare; print(prepare('stamps', 'tiny'))"

A folder of that name is always complete: it is written aside and renamed when the last file is in it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tinyllava.data.stamps import words
from tinyllava.data.stamps.compose import render
from tinyllava.data.stamps.plan import PARTS, Planned, answers, plan
from tinyllava.data.stamps.tiers import TIERS, Tier, tier
from tinyllava.errors import UserError

VERSION = 4  # of questions and boxes: a change of either is a new version, in a folder of its own
QUALITY = 90  # of the JPEGs: 1.5 KB a picture of 64 px
Progress = Callable[[int, int], None]


def prepare(
    root: str | Path, name: str = "tiny", seed: int = 0, progress: Progress | None = None, scale: float = 1.0
) -> Path:
    """Write tier `name` under `root` and return its folder; one that is there is returned as it is.

    `scale` multiplies the number of pictures (for tests); `progress(done, total)` is called as pictures are written.
    Raises UserError for a tier that does not exist.
    """
    if name not in TIERS:
        raise UserError(f"no stamps tier {name!r}. There are {', '.join(TIERS)}.")
    folder = Path(root) / (f"{name}-v{VERSION}-seed{seed}" + (f"-x{scale:g}" if scale != 1 else ""))
    if (folder / "manifest.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(aside, tier(name), seed, scale, progress)
        if folder.exists():  # no manifest: not one of ours that was finished
            shutil.rmtree(folder)
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def _write(folder: Path, tier: Tier, seed: int, scale: float, progress: Progress | None) -> None:
    (folder / "images").mkdir()
    counts = {part: max(8, round(getattr(tier, part) * scale)) for part in PARTS if getattr(tier, part)}
    parts = {part: list(plan(tier, seed, part, count)) for part, count in counts.items()}
    _draw(folder, [planned for part in parts.values() for planned in part], progress)
    files = {}
    for part, planned in parts.items():
        lines = [json.dumps(p.record, ensure_ascii=False) for p in planned]
        text = "\n".join(lines) + "\n" if part == "test" else "[\n" + ",\n".join(lines) + "\n]\n"
        file = f"{part}.jsonl" if part == "test" else f"{part}.json"
        files[file] = _put(folder / file, text, len(lines))
    lines = list(_boxes(parts))
    files["boxes.jsonl"] = _put(folder / "boxes.jsonl", "\n".join(lines) + "\n", len(lines))
    manifest = facts(tier) | {
        "seed": seed,
        "size": tier.size,
        "scale": scale,
        "pictures": sum(p.scene is not None for part in parts.values() for p in part),
        "files": files,
        "categories": list(answers(tier)),
    }
    _put(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n", 1)


def facts(tier: Tier) -> dict:
    """What is shown and written in a tier, and what never is: the part of a manifest that every seed shares."""
    reading = "reading" in tier.kinds
    return {
        "dataset": "stamps",
        "version": VERSION,
        "tier": tier.name,
        "concepts": list(tier.concepts),
        "held_out": {
            "concepts": list(tier.held_out),
            "words": list(words.split(words.HELD_OUT)) if reading else [],
            "fonts": list(words.HELD_OUT_FONTS) if reading else [],
        },
    }


def _put(path: Path, text: str, records: int) -> dict:
    """Write one file; its entry in the manifest."""
    path.write_text(text, encoding="utf-8", newline="\n")
    return {"records": records, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _boxes(parts: dict[str, list[Planned]]) -> Iterator[str]:
    """What is where in each picture, a line a picture: for tests, and to look into a wrong answer."""
    for planned in (p for part in parts.values() for p in part if p.scene):
        scene = planned.scene
        things = [{"name": t.concept.name, "box": t.box} | ({"tint": t.tint} if t.tint else {}) for t in scene.things]
        things += [{"word": w.text, "font": w.font, "box": w.box} for w in scene.words]
        yield json.dumps({"image": planned.record["image"], "background": scene.background, "things": things})


def _draw(folder: Path, planned: list[Planned], progress: Progress | None) -> None:
    """One process is enough: 64 px take half a millisecond, so `tiny` is drawn in ten seconds."""
    shown = [p for p in planned if p.scene]
    for done, one in enumerate(shown, start=1):
        render(one.scene).save(folder / one.record["image"], quality=QUALITY, subsampling=0)
        if progress and (done % 100 == 0 or done == len(shown)):
            progress(done, len(shown))
