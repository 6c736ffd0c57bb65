"""Adapters: what is trained is saved, restored, loaded by others, merged; and never put onto another base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests.cli_tools import CommandResult, assert_refused, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tests.conftest import LLAMA
from tests.records import write_again
from tests.tiny_vlm import build_moved_vlm, compute_logits
from tinyllava import checkpoint
from tinyllava.checkpoint import adapter, weight_files
from tinyllava.checkpoint.adapter import ADAPTER, merge_adapter
from tinyllava.errors import UserError

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "both": {"use_dora": True, "use_rslora": True, "init_lora_weights": "gaussian", "dropout": 0.1},
}


def adapt_all_parts(**options: object) -> dict:
    return {
        "llm": {"lora": {"r": 4, "alpha": 8, **options}},
        "vision_tower": {"lora": {"r": 2, "alpha": 2, **options}},
        "connector": "full",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_saved_restored_and_merged(kind: str, pictures: Path, tmp_path: Path) -> None:
    vlm = build_moved_vlm(adapt_all_parts(**KINDS[kind]))
    before = compute_logits(vlm.model, vlm.processor, pictures)
    checkpoint.save(vlm, tmp_path / "c")
    stored = load_file(tmp_path / "c" / ADAPTER)
    assert any("lora_magnitude_vector" in name for name in stored) == ("use_dora" in KINDS[kind])
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.zero_()
    checkpoint.restore(vlm.model, tmp_path / "c")
    torch.testing.assert_close(compute_logits(vlm.model, vlm.processor, pictures), before, rtol=0, atol=0)

    loaded = checkpoint.load(tmp_path / "c").model
    torch.testing.assert_close(compute_logits(loaded, vlm.processor, pictures), before, rtol=0, atol=0)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "c").eval()
    assert type(theirs).__module__ == "transformers.models.llava.modeling_llava"
    torch.testing.assert_close(compute_logits(theirs, vlm.processor, pictures), before, rtol=0, atol=0)

    base = {name for name, _ in build_moved_vlm().model.named_parameters()}
    merged = merge_adapter(loaded)
    torch.testing.assert_close(compute_logits(merged, vlm.processor, pictures), before, atol=1e-5, rtol=1e-4)
    assert {name for name, _ in merged.named_parameters()} == base


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_reads_the_adapter(kind: str, pictures: Path, tmp_path: Path) -> None:
    vlm = build_moved_vlm(adapt_all_parts(**KINDS[kind]))
    checkpoint.save(vlm, tmp_path)
    # Only the modules of `plain` matter: peft reads the adapter's weights below.
    plain = merge_adapter(checkpoint.load(tmp_path).model)
    inject_adapter_in_model(PeftConfig.from_pretrained(tmp_path), plain)
    weights = {name.removeprefix("base_model.model."): t for name, t in load_peft_weights(tmp_path, "cpu").items()}
    read = set_peft_model_state_dict(plain, weights)
    assert not read.unexpected_keys and not [name for name in read.missing_keys if ".lora_" in name]
    for name, parameter in vlm.model.named_parameters():
        if ".lora_" in name:
            torch.testing.assert_close(plain.get_parameter(name), parameter, rtol=0, atol=0)


def test_an_adapter_names_its_base_and_is_refused_on_another(
    tinyllava: Callable[..., CommandResult], pictures: Path, tmp_path: Path
) -> None:
    vlm = build_moved_vlm(adapt_all_parts())
    checkpoint.save(vlm, tmp_path / "a")
    with safe_open(tmp_path / "a" / ADAPTER, framework="pt") as file:
        trained_on = json.loads(file.metadata()["base"])
    assert set(trained_on) == {"vision_tower", "llm"}  # it brings its connector

    vlm.model = build_moved_vlm(llm={**LLAMA, "initializer_range": 0.05}).model
    checkpoint.save(vlm, tmp_path / "b")
    for name in (ADAPTER, "adapter_config.json"):
        shutil.copy(tmp_path / "a" / name, tmp_path / "b" / name)
    with pytest.raises(UserError, match=r"b is damaged: adapter_config\.json is not in the record"):
        checkpoint.load(tmp_path / "b")
    write_again(tmp_path / "b")
    digests = adapter.hash_weights(weight_files.find_base_files(tmp_path / "b"))
    wanted, here = trained_on["llm"][:12], digests["llm"][:12]
    says = f"trained on vision_tower .*, llm {wanted}, but the directory holds vision_tower .*, llm {here} "
    with pytest.raises(UserError, match=f"another base: it was {says}"):
        checkpoint.load(tmp_path / "b")
    said = tinyllava("export", tmp_path / "b", "--to", "merged", "--output", tmp_path / "m")
    assert_refused(said, "belongs to another base")
    assert not (tmp_path / "m").exists()


def test_one_changed_number_is_another_base(tmp_path: Path) -> None:
    vlm = build_moved_vlm(adapt_all_parts())
    checkpoint.save(vlm, tmp_path)
    file = tmp_path / "language_model.safetensors"
    weights = load_file(file)
    weights["language_model.model.norm.weight"][3] += 1e-6
    save_file(weights, file, metadata={"format": "pt"})
    write_again(tmp_path)
    with pytest.raises(UserError, match=r"trained on llm \w{12}, but the directory holds llm \w{12} "):
        checkpoint.load(tmp_path)


def test_a_base_in_other_files_is_the_same_base(pictures: Path, tmp_path: Path) -> None:
    """One file or several, under the record or without it: names, shapes, dtypes and numbers count."""
    vlm = build_moved_vlm(adapt_all_parts())
    before = compute_logits(vlm.model, vlm.processor, pictures)
    checkpoint.save(vlm, tmp_path)
    files = weight_files.find_base_files(tmp_path)
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in [*files, tmp_path / weight_files.INDEX, tmp_path / checkpoint.RECORD]:
        file.unlink()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = checkpoint.load(tmp_path).model
    torch.testing.assert_close(compute_logits(loaded, vlm.processor, pictures), before, rtol=0, atol=0)


def test_linked_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = build_moved_vlm(adapt_all_parts())
    files = checkpoint.save(vlm, tmp_path / "a")
    opened = []
    original = adapter.safe_open
    monkeypatch.setattr(
        adapter, "safe_open", lambda file, **kwargs: opened.append(file.name) or original(file, **kwargs)
    )
    kept = {part: files[part] for part in ("llm", "vision_tower")}
    checkpoint.save(vlm, tmp_path / "b", reuse=kept)
    assert opened == ["connector.safetensors"]


def test_an_adapter_that_says_nothing_of_its_base_is_taken(pictures: Path, tmp_path: Path) -> None:
    vlm = build_moved_vlm(adapt_all_parts())
    checkpoint.save(vlm, tmp_path)
    save_file(load_file(tmp_path / ADAPTER), tmp_path / ADAPTER, metadata={"format": "pt"})
    write_again(tmp_path)
    checkpoint.load(tmp_path)
