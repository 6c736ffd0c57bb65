"""The plugin for lmms-eval, run by its command line on tasks in a folder (skipped if lmms-eval is not installed)."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_session import tiny_session
from tinyllava import checkpoint
from tinyllava.data.sample import Message, Sample
from tinyllava.infer import Session

ENTRY_POINT = {"tinyllava_factory": "tinyllava.eval.lmms:manifests"}
OPTIONS = ["a red cat", "a blue dog", "two, three or four of them"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.text
doc_to_target: {target}
{more}
"""
SAYS = """
generation_kwargs: {max_new_tokens: 6, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false, until: ["a"]}
process_results: !function utils.results
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""
CHOOSES = """
doc_to_choice: options
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
UTILS = """
from pathlib import Path
from PIL import Image

def pictures(doc):
    return [Image.open(Path(__file__).parent / doc["picture"]).convert("RGB")] if doc["picture"] else []

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    return {"right": float(results[0] == doc["said"])}
"""


def test_the_package_declares_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == ENTRY_POINT


def test_lmms_eval_gets_the_answers_of_a_session(tmp_path) -> None:
    pytest.importorskip("lmms_eval")
    made = tiny_session()
    checkpoint.save(made.vlm, tmp_path / "checkpoint")
    session, rng, docs = Session.load(tmp_path / "checkpoint", device="cpu"), np.random.default_rng(0), []
    for number in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        picture = f"{number}.png" if number else ""  # one question without a picture
        question = f"What is in the picture? {number}"
        images = [Image.open(tmp_path / picture).convert("RGB")] if picture else []
        sample = Sample([Message("user", "<image>\n" * len(images) + question)], images)
        (result,) = session.generate([sample], max_new_tokens=6)
        ((*actual,),) = session.loglikelihood([sample], [OPTIONS])
        best = max(range(3), key=lambda at: actual[at].total)
        docs.append({"picture": picture, "question": question, "said": result, "options": OPTIONS, "best": best})
    docs[-1]["said"] = "something else"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "utils.py").write_text(UTILS)
    for name, kind, target, more in (
        ("says", "generate_until", "said", SAYS),
        ("chooses", "multiple_choice", "best", CHOOSES),
    ):
        task = TASK.format(name=name, kind=kind, target=target, more=more, data=tmp_path / "data.jsonl")
        (tmp_path / f"{name}.yaml").write_text(task)
    registered = tmp_path / "site/tinyllava_plugin-1.dist-info"  # as an installation does it
    registered.mkdir(parents=True)
    (registered / "METADATA").write_text("Metadata-Version: 2.1\nName: tinyllava-plugin\nVersion: 1\n")
    lines = [f"{name} = {value}" for name, value in ENTRY_POINT.items()]
    (registered / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines, ""]))

    paths = os.pathsep.join(
        [str(tmp_path / "site"), str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    words = ["--model", "tinyllava_factory", "--model_args", f"pretrained={tmp_path / 'checkpoint'}", "--device", "cpu"]
    words += ["--tasks", "says,chooses", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout[-1500:], done.stderr[-6000:])
    (path,) = (tmp_path / "out").rglob("*results.json")
    scores = json.loads(path.read_text())["results"]
    assert scores["says"]["right,none"] == pytest.approx(5 / 6)
    assert scores["chooses"]["acc,none"] == 1.0
