"""Parity: `compat=True` gives the ids and labels of the original TinyLLaVA Factory, exact ones where it was wrong.

The cases lie in `templates/` beside this file; PARITY_TEMPLATES=DIR judges by another directory of the same form:
cases.json with `conversations`, `cases` and `eval_prompts` (-200 is a picture), and tokenizers/NAME or NAME_fast.

    PARITY_TEMPLATES=DIR pytest tests/parity/test_templates.py
"""

import json
import os
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tinyllava.data.sample import Sample, SampleError
from tinyllava.data.template import Template, add_image_token, image_token_id

ROOT = Path(os.environ.get("PARITY_TEMPLATES") or Path(__file__).parent / "templates")
DATA = json.loads((ROOT / "cases.json").read_text(encoding="utf-8"))


def name_of(case: dict) -> str:
    kind = case.get("conversation", "prompt")
    return f"{case['template']}-{case['tokenizer']}{'_fast' * bool(case.get('use_fast'))}-{kind}"


@cache
def load_tokenizer(name: str, use_fast: bool):
    folders = [ROOT / "tokenizers" / folder for folder in (name, f"{name}_fast")]
    folders = [folder for folder in (reversed(folders) if use_fast else folders) if folder.is_dir()]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    add_image_token(tokenizer)
    return tokenizer


def with_placeholders(ids: list[int], tokenizer) -> list[int]:
    return [-200 if token == image_token_id(tokenizer) else token for token in ids]


@pytest.mark.parametrize("case", DATA["cases"], ids=name_of)
def test_labels(case):
    tokenizer = load_tokenizer(case["tokenizer"], case["use_fast"])
    turns = DATA["conversations"][case["conversation"]]
    sample = Sample.from_llava({"id": case["conversation"], "conversations": turns})
    template = Template.load(case["template"], compat=True)
    human_last = turns[-1]["from"] == "human"
    if human_last or any(turn["from"] == "gpt" and "<image>" in turn["value"] for turn in turns):
        assert case["verdict"] != "ok"
        with pytest.raises(SampleError, match="expected an answer" if human_last else "an answer holds <image>"):
            template.encode(sample, tokenizer)
        return

    encoded = template.encode(sample, tokenizer)
    if case["verdict"] == "ok":
        assert with_placeholders(encoded["input_ids"], tokenizer) == case["input_ids"]
        assert encoded["labels"] == case["labels"]
    # Right or wrong in the original, each turn supervises what is expected, after one space where the format has it.
    runs = [list(run) for learned, run in groupby(encoded["labels"], lambda label: label != -100) if learned]
    supervised = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
    assert len(supervised) == len(case["expected_text"])
    for text, expected in zip(supervised, case["expected_text"], strict=True):
        assert text in (expected, " " + expected)


@pytest.mark.parametrize("case", DATA["eval_prompts"], ids=name_of)
def test_prompts(case):
    tokenizer = load_tokenizer(case["tokenizer"], case["use_fast"])
    # The pretrain format of the original leaves the question out of its prompt, so any will do there.
    question = case["prompt"].partition("USER: ")[2].removesuffix(" ASSISTANT:") or "<image>\nWhat is this?"
    sample = Sample.from_llava({"conversations": [{"from": "human", "value": question}]})
    prompt = Template.load(case["template"], compat=True).encode_prompt(sample, tokenizer)
    assert prompt["text"] == case["prompt"]
    assert with_placeholders(prompt["input_ids"], tokenizer) == case["input_ids"]
