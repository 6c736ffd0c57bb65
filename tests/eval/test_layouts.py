"""Each benchmark in all its layouts: the same items give the same questions, right answers and scores.

The Hub's tables have the columns and types of their cards on the Hub. The items are those of the fixtures.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from oracle_tools import copy_of, write_mmmu
from PIL import Image

from tinyllava.errors import UserError
from tinyllava.eval.benchmarks import Question
from tinyllava.eval.score import score_answers
from tinyllava.factory import Factory

EIGHT = ("gqa", "mme", "mmmu", "mmvet", "pope", "scienceqa", "textvqa", "vqav2")
LLAVA_FILES = ("llava_*.json", "llava_*.jsonl", "llava-*.jsonl")
TEXT, TEXTS, PICTURE = pa.string(), pa.list_(pa.string()), pa.struct([("bytes", pa.binary()), ("path", pa.string())])
OBJECT = pa.struct([("objectId", TEXT), ("value", TEXT)])
STEP = [("operation", TEXT), ("argument", TEXT), ("dependencies", pa.list_(pa.int32()))]
ANSWER = pa.struct([("answer", TEXT), ("answer_confidence", TEXT), ("answer_id", pa.int64())])
VQA = {"question_type": TEXT, "multiple_choice_answer": TEXT, "answers": pa.list_(ANSWER), "image_id": pa.int64()}
VQA |= {"answer_type": TEXT, "question_id": pa.int64(), "question": TEXT, "image": PICTURE}


def picture(name: str) -> dict:
    """A small image that differs from all others, in the form of the Hub."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), tuple(hashlib.sha256(name.encode()).digest()[:3])).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": Path(name).name}


def write(folder: Path, split: str, columns: dict[str, pa.DataType], rows: list[dict], shards: int = 2) -> None:
    """Write parquet files as `datasets` does."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        part = rows[shard * len(rows) // shards : (shard + 1) * len(rows) // shards]
        table = pa.table({name: pa.array([row.get(name) for row in part], kind) for name, kind in columns.items()})
        pq.write_table(table, folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet", row_group_size=3)


# -- the Hub's tables, made of the release --------------------------------------------------------------------------


def pope(release: Path, hub: Path) -> None:
    columns = dict.fromkeys(("id", "question_id", "question", "answer", "image_source"), TEXT)
    rows = []
    for category in ("adversarial", "popular", "random"):
        for line in (release / f"coco/coco_pope_{category}.json").read_text().splitlines():
            one = json.loads(line)
            more = {"id": str(len(rows)), "question": one["text"], "answer": one["label"], "category": category}
            more |= {"image_source": Path(one["image"]).stem, "image": picture(one["image"])}
            rows.append({**more, "question_id": str(one["question_id"])})
    write(hub / "data", "test", columns | {"image": PICTURE, "category": TEXT}, rows)


def gqa(release: Path, hub: Path) -> None:
    columns = dict.fromkeys(("id", "imageId", "question", "answer", "fullAnswer"), TEXT) | {"isBalanced": pa.bool_()}
    columns |= {"groups": pa.struct([("global", TEXT), ("local", TEXT)]), "entailed": TEXT, "equivalent": TEXT}
    columns |= {"types": pa.struct([("structural", TEXT), ("semantic", TEXT), ("detailed", TEXT)])}
    sides = [(side, pa.list_(OBJECT)) for side in ("question", "answer", "fullAnswer")]
    columns |= {"annotations": pa.struct(sides), "semantic": pa.list_(pa.struct(STEP)), "semanticStr": TEXT}
    questions = json.loads((release / "testdev_balanced_questions.json").read_text())
    rows = [
        {**q, "id": qid, "entailed": str(q["entailed"]), "equivalent": str(q["equivalent"]), "annotations": None}
        for qid, q in questions.items()
    ]
    write(hub / "testdev_balanced_instructions", "testdev", columns, rows, shards=1)
    images = [{"id": name, "image": picture(f"{name}.jpg")} for name in sorted({q["imageId"] for q in rows})]
    write(hub / "testdev_balanced_images", "testdev", {"id": TEXT, "image": PICTURE}, images, shards=1)


def textvqa(release: Path, hub: Path) -> None:
    columns = {"image_id": TEXT, "question_id": pa.int32(), "question": TEXT, "question_tokens": TEXTS}
    columns |= {"image": PICTURE, "image_width": pa.int32(), "image_height": pa.int32(), "answers": TEXTS}
    columns |= {"flickr_original_url": TEXT, "flickr_300k_url": TEXT, "image_classes": TEXTS, "set_name": TEXT}
    tokens = {
        one["image_id"]: one["ocr_tokens"]
        for one in json.loads((release / "TextVQA_Rosetta_OCR_v0.2_val.json").read_text())["data"]
    }
    rows = [
        {**a, "image": picture(f"{a['image_id']}.jpg"), "ocr_tokens": tokens.get(a["image_id"], [])}
        for a in json.loads((release / "TextVQA_0.5.1_val.json").read_text())["data"]
    ]
    write(hub / "data", "validation", columns | {"ocr_tokens": TEXTS}, rows)


def vqav2(release: Path, hub: Path) -> None:
    gold = json.loads((release / "v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    asked = {
        q["question_id"]: q
        for q in json.loads((release / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    }
    rows = [{**a, **asked[a["question_id"]], "image": picture(f"COCO_val2014_{a['image_id']:012d}.jpg")} for a in gold]
    write(hub / "data", "validation", VQA, rows)


def scienceqa(release: Path, hub: Path) -> None:
    columns = {"image": PICTURE, "question": TEXT, "choices": TEXTS, "answer": pa.int8()}
    columns |= dict.fromkeys(("hint", "task", "grade", "subject", "topic", "category"), TEXT)
    problems = json.loads((release / "problems.json").read_text())
    rows = []
    for pid in json.loads((release / "pid_splits.json").read_text())["test"]:
        image = picture(f"{pid}/{problems[pid]['image']}") if problems[pid]["image"] else None
        rows.append({**problems[pid], "image": image})
    columns |= dict.fromkeys(("skill", "lecture", "solution"), TEXT)
    write(hub / "ScienceQA-FULL", "test", columns, rows)


def mme(release: Path, hub: Path) -> None:
    rows = []
    for file in sorted((release / "MME_Benchmark_release_version").rglob("*.txt")):
        category = file.relative_to(release).parts[1]
        for line in file.read_text(encoding="utf-8").strip().split("\n"):
            question, answer = line.split("\t")
            qid = f"{category}/{file.stem}.jpg"
            one = {"question_id": qid, "question": question, "answer": answer, "category": category}
            rows.append({**one, "image": picture(f"{file.stem}.jpg")})
    columns = {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answer": TEXT, "category": TEXT}
    write(hub / "data", "test", columns, rows, shards=4)


def mmvet(release: Path, hub: Path) -> None:
    rows = [
        {**one, "question_id": name, "image": picture(one["imagename"]), "capability": ",".join(one["capability"])}
        for name, one in json.loads((release / "mm-vet.json").read_text()).items()
    ]
    columns = {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answer": TEXT}
    write(hub / "data", "test", columns | {"image_source": TEXT, "capability": TEXT}, rows, shards=1)


def mmmu(release: Path, hub: Path) -> None:
    columns = dict.fromkeys(("id", "question", "options", "explanation"), TEXT)
    columns |= {f"image_{number}": PICTURE for number in range(1, 8)}
    columns |= dict.fromkeys(("img_type", "answer", "topic_difficulty", "question_type", "subfield"), TEXT)
    rows = [
        {
            "id": one["id"],
            "question": one.get("question") or one["prompt"].split("\n")[0],
            "options": one.get("options", "[]"),
            "image_1": picture(one["image"]) if one.get("image") else None,
            "answer": one["answer"],
            "question_type": one["question_type"],
        }
        for one in json.loads((release / "anns_for_eval.json").read_text())
    ]
    for row in rows:  # the official tables: a folder a subject; lmms-eval's are the same rows in data/
        write(hub / "_".join(row["id"].split("_")[1:-1]), "validation", columns, [row], shards=1)


HUB: dict[str, Callable[[Path, Path], None]] = {one.__name__: one for one in (pope, gqa, textvqa, vqav2)}
HUB |= {one.__name__: one for one in (scienceqa, mme, mmvet, mmmu)}


# -- the three layouts ----------------------------------------------------------------------------------------------


def complete(name: str, folder: Path) -> None:
    """Add to a fixture what is missing for a whole release."""
    if name == "mmmu":
        (folder / "answer_dict_val.json").unlink()  # of other questions
        write_mmmu(folder)
        file = folder / "anns_for_eval.json"
        file.write_text(
            file.read_text().replace('"How many?"', '"How many?\\nAnswer the question using a single word or phrase."')
        )
    if name == "textvqa":  # the OCR file that LLaVA's prompts were made of
        data = {}
        for line in (folder / "llava_textvqa_val_v051_ocr.jsonl").read_text().splitlines():
            one = json.loads(line)
            middle = one["text"].split("\n")[1:-1]
            data[one["question_id"]] = middle[0].removeprefix("Reference OCR token: ").split(", ") if middle else []
        tokens = [{"image_id": name, "ocr_tokens": tokens} for name, tokens in data.items()]
        (folder / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps({"data": tokens}))


def layouts(name: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(layout, root) of a benchmark: LLaVA's folder, the release alone, the Hub's tables alone, LLaVA's with those."""
    llava = tmp_path / "llava"
    folder = copy_of(name, llava)
    complete(name, folder)
    for question in Factory("benchmarks").get(name)().questions(llava):
        for image in question.images:
            Path(image).parent.mkdir(parents=True, exist_ok=True)
            named = Path(image).relative_to(Path(image).parents[1]) if name == "scienceqa" else Path(image).name
            Path(image).write_bytes(picture(str(named))["bytes"])
    yield "llava", llava
    release = tmp_path / "release"
    shutil.copytree(llava, release)
    (release_folder,) = (release / "eval").iterdir()
    for pattern in LLAVA_FILES:
        for file in release_folder.glob(pattern):
            file.unlink()
    yield "release", release
    hub = tmp_path / "hub"
    HUB[name](release_folder, hub / folder.name)
    yield "hub", hub
    if name not in ("scienceqa", "mmmu", "vqav2"):  # scienceqa: the Hub has no ids. The other two: see below
        both = tmp_path / "both"
        shutil.copytree(hub, both)
        for pattern in LLAVA_FILES:
            for file in folder.glob(pattern):
                shutil.copy(file, both / folder.name / file.name)
        yield "both", both


def seen(question: Question, hub_ids: dict[str, str]) -> dict:
    """The fields that must not depend on the layout."""
    return {
        "id": hub_ids.get(question.id, question.id),
        "text": question.text,
        "answer": question.answer,
        "category": question.category,
        "options": question.options,
        "required": question.required,
        "pictures": [Path(image).read_bytes() for image in question.images],
    }


@pytest.mark.parametrize("name", EIGHT)
def test_every_layout_asks_and_scores_the_same(name: str, tmp_path: Path) -> None:
    benchmark = Factory("benchmarks").get(name)()
    known, ids, expected, scores = {}, [], None, set()
    for layout, root in layouts(name, tmp_path):
        asked = benchmark.questions(root)
        if name == "scienceqa" and layout == "hub":  # it has no ids, but the order of the split
            known = {question.id: pid for question, pid in zip(asked, ids, strict=True)}
        ids = [question.id for question in asked]
        actual = sorted((seen(question, known) for question in asked), key=lambda one: one["id"])
        assert len(actual) > 1 and (expected is None or actual == expected), layout
        expected = actual
        lines = [
            {"question_id": q.question_id, "prompt": q.text, "text": guess(known.get(q.id, q.id), q.answer)}
            for q in asked
        ]
        answers = tmp_path / f"{layout}.jsonl"
        answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = score_answers(name, root, answers)
        scores.add((result["score"], result["metric"], result["unparsed"]))
    assert len(scores) == 1, scores


def guess(name: str, answer: object) -> str:
    """An answer that is right for about half of the questions, the same in all layouts."""
    right = answer[0] if isinstance(answer, list) else answer
    right = right["answer"] if isinstance(right, dict) else right
    if isinstance(right, int):
        right = "ABCDE"[right]
    return str(right) if sum(map(ord, name)) % 2 else "No"


def test_vqav2_test_dev_in_all_layouts(tmp_path: Path) -> None:
    vqa = Factory("benchmarks").get("vqav2")(split="test-dev")
    llava = copy_of("vqav2", tmp_path) / "llava"
    asked = vqa.questions(llava)
    for question in asked:
        Path(question.images[0]).parent.mkdir(exist_ok=True)
        Path(question.images[0]).write_bytes(picture(Path(question.images[0]).name)["bytes"])
    rows = []
    for question in asked:
        image = int(Path(question.images[0]).stem.split("_")[-1])
        text = question.text.split("\n")[0]
        rows.append({"question_id": question.question_id, "image_id": image, "question": text})
    release, hub = tmp_path / "release/vqav2", tmp_path / "hub/vqav2"
    shutil.copytree(llava / "test2015", release / "test2015")
    (release / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(json.dumps({"questions": rows}))
    for row in rows:
        row["image"] = picture(f"COCO_test2015_{row['image_id']:012d}.jpg")
    write(hub / "data", "testdev", VQA, rows)
    expected = [seen(question, {}) for question in asked]
    assert len(expected) > 1
    for root in (release, hub):
        assert [seen(question, {}) for question in vqa.questions(root)] == expected


# -- what is not as it should be ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EIGHT)
def test_the_error_for_an_empty_root_says_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"expected .*parquet.* in {tmp_path}.*tinyllava data prepare {name}"):
        Factory("benchmarks").get(name)().questions(tmp_path)


def test_wrong_and_broken_tables_are_refused(tmp_path: Path) -> None:
    pope = Factory("benchmarks").get("pope")()
    write(tmp_path / "pope/data", "test", {"id": TEXT, "image": PICTURE}, [{"id": "1"}], shards=1)
    with pytest.raises(UserError, match=r"test-00000.*has no column question_id.*it has id, image"):
        pope.questions(tmp_path)
    (tmp_path / "pope/data/test-00000-of-00001.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match=r"test-00000.*cannot be read as parquet.*download it again"):
        pope.questions(tmp_path)


def test_a_table_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    pope(copy_of("pope", tmp_path), tmp_path / "hub/pope")
    (tmp_path / "hub/pope/data/test-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="holds 1 of the 2 files"):
        Factory("benchmarks").get("pope")().questions(tmp_path / "hub")


def test_images_are_unpacked_once_and_completely(tmp_path: Path) -> None:
    """If a process dies while it unpacks, its incomplete folder is not used."""
    release, hub = copy_of("mmvet", tmp_path), tmp_path / "hub/mm-vet"
    mmvet(release, hub)
    (hub / "data/.test.partial").mkdir()
    (hub / "data/.test.partial/v1_0.png").write_bytes(b"torn")
    asked = Factory("benchmarks").get("mmvet")().questions(hub)
    pictures = [Path(image) for question in asked for image in question.images]
    assert all(path.parent == hub / "data/test" for path in pictures) and not (hub / "data/.test.partial").exists()
    assert {path.stat().st_size for path in pictures} != {4}
    before = [path.stat().st_mtime_ns for path in pictures]
    Factory("benchmarks").get("mmvet")().questions(hub)
    assert [path.stat().st_mtime_ns for path in pictures] == before


def test_a_table_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    columns = {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answer": TEXT, "category": TEXT}
    for name in ("../../evil.jpg", "/tmp/evil.jpg"):
        root = tmp_path / name.replace("/", "_")
        row = {"question_id": name, "question": "Q? Please answer yes or no.", "answer": "Yes", "category": "OCR"}
        write(root / "data", "test", columns, [{**row, "image": picture("x")}], shards=1)
        with pytest.raises(UserError, match="outside its folder"):
            Factory("benchmarks").get("mme")().questions(root)
