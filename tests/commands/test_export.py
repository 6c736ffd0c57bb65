"""`tinyllava export`: the formats for other tools, the model card, and the upload."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import tinyllava as package
from tests.cli_tools import CommandResult, assert_refused, recipe, run_command_line, write_recipe  # noqa: F401  (the fixture `tinyllava`)
from tests.hub_server import hub

LEGACY = Path(__file__).parents[1] / "parity" / "legacy_checkpoints"
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with scores, whose last stage trained an adapter."""
    from tinyllava.config import load_recipe
    from tinyllava.eval.run import hash_checkpoint
    from tinyllava.train.stage import run

    folder = tmp_path_factory.mktemp("run")
    final = run(load_recipe(str(write_recipe(folder, recipe(pictures)))), "tiny", folder / "tiny")
    entry = {"title": "POPE", "metric": "F1", "score": 85.25, "n": 8910, "scorer": "evaluate.py 3df3ba1"}
    results = {"made_with": {"checkpoint": hash_checkpoint(final)}, "tasks": {"pope": entry}}
    (folder / "tiny" / "results.json").write_text(json.dumps(results))
    return folder / "tiny"


def greedy(directory: Path, picture: Path) -> list[int]:
    """The greedy answer of plain transformers with the model in a directory."""
    processor = AutoProcessor.from_pretrained(directory, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(directory)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(picture).convert("RGB"), text=text, return_tensors="pt")
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()


def test_hf_has_a_card_with_recipe_and_scores_and_answers_as_before(
    tinyllava: Callable[..., CommandResult], trained: Path, tmp_path: Path, pictures: Path
) -> None:
    out = tmp_path / "my-model"
    said = tinyllava("export", trained, "--to", "hf", "--output", out)
    assert said.code == 0 and f"{out}: plain llava" in said.out, said.err
    assert not list(out.glob("adapter*"))  # folded in
    assert greedy(out, pictures / "3.png") == greedy(trained / "finetune" / "final", pictures / "3.png")

    _, metadata, text = (out / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert metadata["pipeline_tag"] == "image-text-to-text" and metadata["library_name"] == "transformers"
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "F1", "value": 85.25}]
    assert "| POPE | F1 | 85.2 | 8,910 | evaluate.py 3df3ba1 |" in text
    assert "connector full, llm lora" in text and "`CLIPVisionModel`" in text
    assert "global_batch_size: 4" in text and "AutoModelForImageTextToText" in text and str(trained) not in text


def test_the_card_has_no_scores_of_other_weights(
    tinyllava: Callable[..., CommandResult], trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "first-stage"
    assert tinyllava("export", trained / "pretrain" / "final", "--to", "hf", "--output", out).code == 0
    assert "POPE" not in (out / "README.md").read_text()


def test_split_prints_what_it_wrote(tinyllava: Callable[..., CommandResult], trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    said = tinyllava("export", trained, "--to", "split", "--output", out)
    assert said.code == 0, said.err
    assert all(f"{out}/{part}" in said.out for part in ("llm", "vision_tower", "connector")), said.out


def test_unknown_forms_and_missing_adapters_are_refused(
    tinyllava: Callable[..., CommandResult], trained: Path, tmp_path: Path
) -> None:
    first = trained / "pretrain" / "final"
    assert_refused(tinyllava("export", first, "--to", "merged", "--output", tmp_path / "x"), "no adapter")
    assert_refused(tinyllava("export", first, "--to", "hg", "--output", tmp_path / "x"), "did you mean 'hf'")
    assert_refused(tinyllava("export", first, "--to", "hf", "--output", tmp_path), "exists already")
    assert not (tmp_path / "x").exists()


def test_an_uploaded_model_can_be_loaded_by_its_name(trained: Path, tmp_path: Path, pictures: Path) -> None:
    """It runs in a separate process, because huggingface_hub reads the environment when it is imported."""
    with hub() as (address, repositories):
        for token, code in (("hf_bad", 2), ("hf_good", 0)):
            out = tmp_path / token
            command = [sys.executable, "-m", "tinyllava", "export", trained, "--to", "hf", "--output", out]
            there = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
            command += ["--push", "me/tiny"]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **there})
            assert done.returncode == code, done.stderr
            if code:
                assert "Traceback" not in done.stderr and f"hf upload me/tiny {out}" in done.stderr
                assert (out / "README.md").is_file() and not repositories
            else:  # and back again, by its name
                chat = [sys.executable, "-m", "tinyllava", "chat", "me/tiny", pictures / "3.png", "--prompt", QUESTION]
                there["HF_HOME"] = str(tmp_path / "hub")
                back = subprocess.run(chat, capture_output=True, text=True, env={**os.environ, **there})
                assert back.returncode == 0, back.stderr
                assert back.stdout.strip() == package.load(out).chat(QUESTION, str(pictures / "3.png"))
                chat[4] = "me/tinny"
                gone = subprocess.run(chat, capture_output=True, text=True, env={**os.environ, **there})
                assert gone.returncode == 2 and "me/tinny is not a directory" in gone.stderr
                assert "is not on the Hub" in gone.stderr
    uploaded = repositories["me/tiny"]
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == set(uploaded)
    assert uploaded["language_model.safetensors"] == (out / "language_model.safetensors").read_bytes()
    assert b"# me/tiny" in uploaded["README.md"]


def test_a_checkpoint_of_the_original_can_be_exported(
    tinyllava: Callable[..., CommandResult], tmp_path: Path, pictures: Path
) -> None:
    old = LEGACY / "full_llama_clip_mlp2x" / "checkpoint"
    out = tmp_path / "new"
    said = tinyllava("export", old, "--to", "hf", "--output", out, "--lacking", "template=llama")
    assert said.code == 0 and "plain llava" in said.out, said.err
    sessions = [package.load(old, template="llama"), package.load(out)]
    answers = [session.chat(QUESTION, str(pictures / "3.png"), max_new_tokens=8) for session in sessions]
    assert answers[0] == answers[1]
    again = ("--to", "hf", "--output", tmp_path / "x", "--lacking")
    assert_refused(tinyllava("export", old, *again, "tempate=llama"), "tempate", "did you mean 'template'")
    assert_refused(tinyllava("export", old, *again, "template"), "expected KEY=VALUE")
    assert_refused(tinyllava("export", old, *again, "dinov2_config=gone.json"), "gone.json not found")
