"""Checkpoints in the hands of transformers alone: batches, pipelines, clean files, and files that others may read."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tinyllava
from tests.records import write_earlier
from tests.tiny_session import NEW, tiny_session
from tests.tiny_vlm import build_moved_vlm
from tinyllava import atomic, checkpoint
from tinyllava.commands.split import write_split
from tinyllava.data.sample import Message, Sample
from tinyllava.find import NANO_FOLDER
from tinyllava.model.processor import LOADING

QUESTIONS = ["What?", "How many are there, and what is in the picture beside a red cat and a blue dog?"]
# Prints {directory: [answers alone, answers of a batch, answers of a pipeline, what the masks say is learned]}.
THEIRS = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

def chat(question, answer=None):
    content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    return turns + [{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else turns

def generate(texts):
    inputs = processor(images=[image] * len(texts), text=texts, padding=True, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=10, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(made, skip_special_tokens=True)

picture, directories, questions = json.loads(sys.argv[1])
image, found = Image.open(picture).convert("RGB"), {}
for directory in directories:
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    texts = [processor.apply_chat_template(chat(q), add_generation_prompt=True) for q in questions]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    greedy = {"max_new_tokens": 10, "do_sample": False}
    piped = pipe([chat(q) for q in questions], batch_size=2, return_full_text=False, generate_kwargs=greedy)
    piped = [(row[0] if isinstance(row, list) else row)["generated_text"] for row in piped]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    learned = []
    for maker in (processor, AutoTokenizer.from_pretrained(directory)):
        assert getattr(maker, "tokenizer", maker).is_fast
        made = maker.apply_chat_template(chat(questions[0], "two cats"), **options)
        ids, mask = made["input_ids"], made["assistant_masks"]
        ids, mask = (ids[0], mask[0]) if isinstance(ids[0], list) else (ids, mask)
        learned.append(processor.decode([i for i, kept in zip(ids, mask, strict=True) if kept]))
    found[directory] = [[generate([text])[0] for text in texts], generate(texts), piped, learned]
assert "tinyllava" not in sys.modules
print(json.dumps(found))
"""


def read_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_batch_and_pipeline_of_transformers_answer_as_our_session(pictures: Path, tmp_path: Path) -> None:
    """It runs in a process that never imports this package, for trained, loaded and shipped files."""
    picture = str(pictures / "3.png")
    checkpoint.save(tiny_session().vlm, tmp_path / "trained")
    checkpoint.save(tinyllava.load(tmp_path / "trained", device="cpu").vlm, tmp_path / "loaded")
    directories = [str(tmp_path / "trained"), str(tmp_path / "loaded"), str(NANO_FOLDER / "model")]
    request = json.dumps([picture, directories, QUESTIONS])
    done = subprocess.run([sys.executable, "-c", THEIRS, request], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    samples = [Sample([Message("user", f"<image>\n{question}")], [picture]) for question in QUESTIONS]
    for directory, (alone, batch, piped, learned) in json.loads(done.stdout).items():
        session = tinyllava.load(directory, device="cpu")
        ours = session.generate(samples, **NEW)
        assert [text.strip() for text in alone] == ours and len(set(ours)) == 2
        assert alone == batch and [text.strip() for text in piped] == ours
        assert learned == [" two cats</s>"] * 2


def test_saving_what_was_loaded_changes_no_byte(tmp_path: Path) -> None:
    vlm = build_moved_vlm()
    vlm.processor(text=["a", "b c d"], padding=True, truncation=True, max_length=3)  # leaves its options in a tokenizer
    checkpoint.save(vlm, tmp_path / "a")
    checkpoint.save(checkpoint.load(tmp_path / "a"), tmp_path / "b")
    checkpoint.save(checkpoint.load(tmp_path / "b"), tmp_path / "c")
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b") == read_files(tmp_path / "c")
    assert json.loads((tmp_path / "c" / "tokenizer.json").read_text())["padding"] is None


def test_files_of_older_versions_become_clean(tmp_path: Path) -> None:
    checkpoint.save(build_moved_vlm(), tmp_path / "a")
    path = tmp_path / "a" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    left = {"backend": "pil", "is_local": True, "local_files_only": False, "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    path.write_text(json.dumps({**settings, **left, "padding_side": "right"}))
    write_earlier(tmp_path / "a")
    vlm = checkpoint.load(tmp_path / "a")
    checkpoint.save(vlm, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text()) == settings
    assert settings["padding_side"] == "left"
    write_split(vlm, tmp_path / "split")
    for folder in (tmp_path / "split" / "llm", NANO_FOLDER / "llm"):
        assert not LOADING & json.loads((folder / "tokenizer_config.json").read_text()).keys()
    assert LOADING & json.loads((NANO_FOLDER / "model" / "tokenizer_config.json").read_text()).keys() == {
        "processor_class"
    }


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_allows(umask: int, tmp_path: Path) -> None:
    lora = {"llm": {"lora": {"r": 4, "alpha": 8}}, "connector": "full"}
    before = os.umask(umask)
    try:
        checkpoint.save(build_moved_vlm(lora), tmp_path / "a")
        with atomic.write_directory(tmp_path / "split") as directory:
            write_split(build_moved_vlm(), directory)
            save_file({"a": torch.zeros(1)}, directory / "others.safetensors")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == 8
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
