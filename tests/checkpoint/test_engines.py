"""Which programs can run a checkpoint: the table in its record, and what keeps them from misreading an adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import CLIP, DINOV2, PHI, SIGLIP
from tests.tiny_vlm import build_moved_vlm
from tinyllava import atomic, checkpoint
from tinyllava.checkpoint.adapter import merge_adapter
from tinyllava.checkpoint.saving import find_engines

LORA = {"llm": {"lora": {"r": 4, "alpha": 8}}, "vision_tower": {"lora": {"r": 2, "alpha": 2}}, "connector": "full"}
MLP = {"layers": 2, "act": "gelu"}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False}
SPLIT = "through `tinyllava export DIR --to split`"
CASES = {  # {name: (parts, tune, vLLM, llama.cpp)}
    "clip": ({}, None, "yes", SPLIT),
    "siglip": ({"tower": SIGLIP}, None, "yes", SPLIT),
    "linear": ({"connector": "linear"}, None, "no: it does not have the connector linear", "no: it does not have the"),
    "identity": ({"connector": "identity", "tower": {**CLIP, "hidden_size": 32}}, None, "no: it does not have", "no:"),
    "silu": ({"connector": {"mlp": {**MLP, "act": "silu"}}}, None, "yes", "no: it does not have the connector mlp"),
    "relu6": ({"connector": {"mlp": {**MLP, "act": "relu6"}}}, None, "no: it does not have the connector mlp", "no:"),
    "dinov2": (
        {"tower": DINOV2},
        None,
        "no: it does not have the vision tower dinov2",
        "no: it does not have the vision",
    ),
    "phi": ({"llm": PHI}, None, "no: the LLM's output head has a bias", SPLIT),
    "gpt2": ({"llm": GPT2}, None, "not tested: a gpt2 LLM", SPLIT),
    "three layers": (
        {"connector": "mlp3x_gelu"},
        None,
        "no: the connector mlp3x_gelu is not Llava's",
        "no: it does not",
    ),
    "lora": ({}, LORA, "no: it does not apply an adapter. `tinyllava export DIR --to merged`", SPLIT),
}


@pytest.mark.parametrize("case", CASES)
def test_the_record_says_who_can_run_a_checkpoint(case: str, tmp_path: Path) -> None:
    parts, tune, vllm, llama_cpp = CASES[case]
    vlm = build_moved_vlm(tune, **parts)
    checkpoint.save(vlm, tmp_path)
    engines = checkpoint.read_record(tmp_path)["engines"]
    assert list(engines) == ["transformers", "PEFT", "vLLM", "llama.cpp"]
    assert engines["vLLM"].startswith(vllm) and engines["llama.cpp"].startswith(llama_cpp), engines
    assert (engines["transformers"] == "yes") == checkpoint.read_record(tmp_path)["plain"]
    assert engines["PEFT"] == ("yes" if tune else "no: there is no adapter")


@pytest.mark.parametrize("change,reason", [({"feature_layer": [-2, -1]}, "one layer"), ({"tiles": 4}, "into tiles")])
def test_what_a_recipe_asks_of_the_tower_counts_too(change: dict, reason: str) -> None:
    vlm = build_moved_vlm()
    vlm.model.config.vision_feature_layer = change.get("feature_layer", -2)
    vlm.model.config.tiles = change.get("tiles")
    engines = find_engines(vlm.model)
    assert engines["vLLM"].startswith("no: ") and reason in engines["vLLM"]
    assert engines["llama.cpp"].startswith("no: ") and reason in engines["llama.cpp"]


def test_beside_an_adapter_the_class_is_one_that_no_engine_knows(tmp_path: Path) -> None:
    """vLLM and llama.cpp choose by it, and would leave the adapter out. After a merge, the class is Llava's again."""
    vlm = build_moved_vlm(LORA)
    for folder, expected in (
        ("lora", "LlavaWithAdapter_run_tinyllava_export"),
        ("merged", "LlavaForConditionalGeneration"),
    ):
        checkpoint.save(vlm, tmp_path / folder)
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["architectures"] == [expected] and config["model_type"] == "llava"
        vlm = checkpoint.load(tmp_path / folder)
        if folder == "lora":
            merge_adapter(vlm.model)
    assert find_engines(vlm.model)["vLLM"] == "yes"


AUTO_PEFT = """
import sys, torch
from peft import AutoPeftModel
for directory in sys.argv[1:]:
    model = AutoPeftModel.from_pretrained(directory).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits, f"{directory}/logits.pt")
assert not [name for name in sys.modules if name.startswith("tinyllava")]
"""


def test_peft_loads_the_directory_by_itself(tmp_path: Path) -> None:
    """From another working directory, after the directory was renamed into its place."""
    places, expected = [], []
    for kind in ({}, {"use_dora": True}, {"use_rslora": True}):
        vlm = build_moved_vlm({**LORA, "llm": {"lora": {"r": 4, "alpha": 8, **kind}}, "vision_tower": "frozen"})
        places.append(tmp_path / f"final {len(places)}")
        with atomic.write_directory(places[-1]) as partial:
            checkpoint.save(vlm, partial, name=places[-1])
        config = json.loads((places[-1] / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(places[-1])
        assert config["auto_mapping"]["base_model_class"] == "AutoModelForImageTextToText"
        with torch.no_grad():
            expected.append(vlm.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits)
    command, away = [sys.executable, "-c", AUTO_PEFT, *map(str, places)], tmp_path / "away"
    away.mkdir()
    done = subprocess.run(command, cwd=away, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    for place, logits in zip(places, expected, strict=True):
        torch.testing.assert_close(torch.load(place / "logits.pt"), logits, rtol=0, atol=0)
