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
from tests.conftest import LLAMA
from tests.hub_server import hub
from tests.tiny_vlm import build_moved_vlm, compute_logits
from tinyllava import checkpoint

LEGACY = Path(__file__).parents[1] / "parity" / "legacy_checkpoints"
QUESTION = "What is it?"
UNTIED = {**LLAMA, "tie_word_embeddings": False}


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
    assert "vLLM         yes" in said.out and f"export {out} --to split" in said.out
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


def test_adapter_writes_a_base_and_a_lora_module(
    tinyllava: Callable[..., CommandResult], trained: Path, tmp_path: Path, pictures: Path
) -> None:
    """Together they are the model again; the module holds LoRA layers of the LLM and nothing else, as vLLM requires."""
    from peft import PeftModel
    from safetensors import safe_open

    out, final = tmp_path / "apart", trained / "finetune" / "final"
    said = tinyllava("export", trained, "--to", "adapter", "--output", out)
    assert said.code == 0, said.err
    serve = f"vllm serve {out}/base --enable-lora --max-lora-rank 8 --lora-modules apart={out}/adapter"
    assert serve in said.out and f"{out}/base: plain llava" in said.out
    assert not list((out / "base").glob("adapter*")) and package.load(out / "base")
    assert json.loads((out / "base" / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]
    with safe_open(out / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
    layer = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    assert layer in names and all(".language_model." in name and ".lora_" in name for name in names)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 8, {})
    assert config["modules_to_save"] is None and config["base_model_name_or_path"] == str(out / "base")

    ids = torch.tensor([[5, 6, 7, 8]])
    whole = AutoModelForImageTextToText.from_pretrained(final)(input_ids=ids).logits
    base = AutoModelForImageTextToText.from_pretrained(out / "base")
    assert not torch.equal(base(input_ids=ids).logits, whole)
    model = PeftModel.from_pretrained(base, out / "adapter")
    torch.testing.assert_close(model(input_ids=ids).logits, whole, rtol=0, atol=0)
    moved = out.rename(tmp_path / "moved")  # both directories together
    asked = (QUESTION, str(pictures / "3.png"))
    assert package.load(moved, device="cpu").chat(*asked) == package.load(final, device="cpu").chat(*asked)
    out = moved
    again = ("--to", "adapter", "--output", tmp_path / "x")
    assert_refused(tinyllava("export", out / "base", *again), "no adapter")
    assert not (tmp_path / "x").exists()


ADAPTED = {"lora": {"r": 4, "alpha": 8}}
REFUSED = {  # {what the error says: (parts, tune)}
    "use_dora": ({}, {"llm": {"lora": {"r": 4, "alpha": 8, "use_dora": True}}}),
    "qkv_proj of this LLM": ({"llm": {**UNTIED, "model_type": "phi3"}}, {"llm": ADAPTED}),
    "the LLM has no adapter": ({}, {"vision_tower": ADAPTED}),
    "rank 600": ({}, {"llm": {"lora": {"r": 600, "alpha": 8, "targets": "attention"}}}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_an_adapter_that_vllm_cannot_serve_is_refused(
    reason: str, tinyllava: Callable[..., CommandResult], tmp_path: Path
) -> None:
    parts, tune = REFUSED[reason]
    checkpoint.save(build_moved_vlm(tune, **parts), tmp_path / "c")
    said = tinyllava("export", tmp_path / "c", "--to", "adapter", "--output", tmp_path / "x")
    assert_refused(said, reason, "--to hf")
    assert not (tmp_path / "x").exists()


def test_adapters_of_other_parts_are_merged_into_the_base(
    tinyllava: Callable[..., CommandResult], tmp_path: Path, pictures: Path
) -> None:
    """vLLM adapts only the LLM. Each part has its own rank and alpha here; the module has those of the LLM."""
    from peft import PeftModel

    tower, connector = {"lora": {"r": 2, "alpha": 6}}, {"lora": {"r": 3, "alpha": 3}}
    vlm = build_moved_vlm({"llm": {"lora": {"r": 4, "alpha": 8}}, "vision_tower": tower, "connector": connector})
    checkpoint.save(vlm, tmp_path / "c")
    assert tinyllava("export", tmp_path / "c", "--to", "adapter", "--output", tmp_path / "x").code == 0
    config = json.loads((tmp_path / "x" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (4, 8, {})
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "x" / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "x" / "adapter").eval()
    expected = compute_logits(vlm.model, vlm.processor, pictures)
    torch.testing.assert_close(compute_logits(model, vlm.processor, pictures), expected, rtol=1e-4, atol=1e-4)


def test_no_command_is_printed_for_a_base_that_vllm_cannot_run(
    tinyllava: Callable[..., CommandResult], tmp_path: Path
) -> None:
    checkpoint.save(build_moved_vlm({"llm": ADAPTED}, connector="linear"), tmp_path / "c")
    said = tinyllava("export", tmp_path / "c", "--to", "adapter", "--output", tmp_path / "x")
    assert said.code == 0 and "vLLM         no" in said.out and "vllm serve" not in said.out


@pytest.mark.parametrize("name", ["my model", "https://huggingface.co/me/tiny", "me/tiny/v2"])
def test_a_wrong_repository_is_refused_before_anything_is_written(
    name: str, tinyllava: Callable[..., CommandResult], tmp_path: Path
) -> None:
    said = tinyllava("export", "nano", "--to", "hf", "--output", tmp_path / "x", "--push", name)
    assert_refused(said, name, "USER/NAME")
    assert not (tmp_path / "x").exists()


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
    for name in ("not a name", "me/models/tiny", ""):
        command = ("export", first, "--to", "hf", "--output", tmp_path / "x", "--push", name)
        assert_refused(tinyllava(*command), f"--push '{name}'", "expected USER/NAME")
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
