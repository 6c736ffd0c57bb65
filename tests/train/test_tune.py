"""Three tunings become requires_grad, one LoraConfig and the optimiser's groups, in any mix."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import CLIP, DINOV2, LLAMA, PHI, SIGLIP, tiny_model
from tests.tiny_vlm import build_tiny
from tinyllava import checkpoint
from tinyllava.config import Tune
from tinyllava.errors import UserError
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.vlm import VLM
from tinyllava.train.tune import TunedPart, apply_tuning, make_lora_config, make_parameter_groups
from tinyllava.tuning import Selection


class TunedModel(NamedTuple):
    model: TinyLlavaForConditionalGeneration
    rows: dict[str, TunedPart]  # by part
    trained: set[str]  # names of parameters


def tune_tiny(tune: dict, **parts) -> TunedModel:
    model = build_tiny(tiny_model(**parts)).model
    rows = apply_tuning(model, Tune.model_validate(tune), seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return TunedModel(model, {row.part: row for row in rows}, trained)


def test_frozen_trains_the_connector_alone() -> None:
    _, rows, trained = tune_tiny({})
    assert trained == {f"model.multi_modal_projector.linear_{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")}
    assert rows["connector"].trainable == rows["connector"].parameters > 0 == rows["llm"].trainable


@pytest.mark.parametrize(
    "tower,layers", [(CLIP, "encoder.layers"), (SIGLIP, "encoder.layers"), (DINOV2, "encoder.layer")]
)
def test_partial_finds_the_last_used_layers_of_any_tower(tower: dict, layers: str) -> None:
    _, _, trained = tune_tiny({"vision_tower": {"partial": {"last": 1}}, "connector": "frozen"}, tower=tower)
    # three layers, features from before the last one: the last layer in use is number 1
    assert trained and all(name.startswith(f"model.vision_tower.{layers}.1.") for name in trained)


@pytest.mark.parametrize("llm", [LLAMA, PHI], ids=lambda config: config["model_type"])
def test_partial_finds_the_last_layers_of_any_llm(llm: dict) -> None:
    _, _, trained = tune_tiny({"llm": {"partial": {"last": 1}}, "connector": "frozen"}, llm=llm)
    assert trained and all(name.startswith("model.language_model.layers.1.") for name in trained)
    with pytest.raises(UserError, match="last 3 layers, but it has 2 in use"):
        tune_tiny({"llm": {"partial": {"last": 3}}}, llm=llm)


@pytest.mark.parametrize("tower", [CLIP, SIGLIP, DINOV2], ids=lambda config: config["model_type"])
def test_full_trains_what_the_features_depend_on(tower: dict) -> None:
    _, rows, trained = tune_tiny({"vision_tower": "full", "connector": "frozen"}, tower=tower)
    assert not any(word in name for name in trained for word in (".2.", "head", "post_layernorm", "mask_token"))
    assert 0 < rows["vision_tower"].trainable < rows["vision_tower"].parameters


def test_full_of_an_untied_llm_trains_its_head() -> None:
    assert "lm_head.weight" in tune_tiny({"llm": "full"}, llm={**LLAMA, "tie_word_embeddings": False}).trained
    assert "lm_head.bias" in tune_tiny({"llm": "full"}, llm=PHI).trained


def test_each_part_has_its_own_lora() -> None:
    tune = {
        "llm": {"lora": {"r": 8, "alpha": 16}},
        "vision_tower": {"lora": {"r": 2, "alpha": 6, "targets": "attention"}},
        "connector": "full",
    }
    model, _, trained = tune_tiny(tune)
    q = model.model.language_model.layers[0].self_attn.q_proj
    v = model.model.vision_tower.encoder.layers[0].self_attn.v_proj
    assert (q.r["default"], q.scaling["default"]) == (8, 2.0)
    assert (v.r["default"], v.scaling["default"]) == (2, 3.0)
    adapted = {name.split(".lora_")[0] for name in trained if ".lora_" in name}
    assert not any("vision_tower" in name and ("mlp" in name or "layers.2" in name) for name in adapted)
    assert not any("lm_head" in name for name in adapted)
    assert {name for name in trained if "projector" in name} and all("lora" in n or "projector" in n for n in trained)


def test_every_part_has_its_own_learning_rate() -> None:
    tune = {"llm": {"full": {}, "lr": 1e-5}, "vision_tower": {"partial": {"last": 1}, "lr": 1e-6}}
    model, _, trained = tune_tiny(tune)
    decayed = {name for name in trained if name.endswith("weight") and "norm" not in name}
    groups = make_parameter_groups(model, Tune.model_validate(tune), lr=1e-3, weight_decay=0.1, decayed=decayed)
    rates = {group["part"]: group["lr"] for group in groups}
    assert rates == {"llm": 1e-5, "vision_tower": 1e-6, "connector": 1e-3}
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


@pytest.mark.parametrize("family", [LLAMA, PHI, CLIP, SIGLIP, DINOV2], ids=lambda config: config["model_type"])
def test_attention_is_every_projection_of_the_attention_and_nothing_else(family: dict) -> None:
    part = "llm" if family in (LLAMA, PHI) else "vision_tower"
    where = {"llm": family} if part == "llm" else {"tower": family}
    tune = {part: {"lora": {"targets": "attention"}}, "connector": "frozen"}
    adapted = {name.split(".lora_")[0] for name in tune_tiny(tune, **where).trained}
    layers = 2  # in use: all of an LLM's, and those of a tower below its feature layer
    assert len(adapted) == 4 * layers and all("att" in name for name in adapted)


def test_peft_options_go_on_to_every_adapter() -> None:
    lora = {"lora": {"r": 4, "alpha": 8, "use_dora": True, "use_rslora": True, "dropout": 0.1}}
    model, rows, trained = tune_tiny({"llm": lora, "vision_tower": lora})
    q = model.model.language_model.layers[0].self_attn.q_proj
    assert q.scaling["default"] == 8 / 4**0.5 and q.use_dora["default"] and q.lora_dropout["default"].p == 0.1
    assert len({name for name in trained if "lora_magnitude_vector" in name}) == len(trained - {""}) // 3 - 1
    assert rows["llm"].tuning == "lora (r 4, alpha 8, use_dora True, use_rslora True, dropout 0.1)"


def build_with_new_tokens(tune: dict, llm: dict, folder: Path, tokens: int = 3) -> tuple[VLM, int]:
    """An LLM from a directory, as from the Hub, whose tokenizer got `tokens` more than it has rows for."""
    base = build_tiny(tiny_model(llm=llm))
    config, tokenizer = base.model.config.text_config, base.tokenizer
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "llm")
    tokenizer.add_tokens([f"<new{number}>" for number in range(tokens)])
    tokenizer.save_pretrained(folder / "llm")
    spec = {**tiny_model(), "llm": str(folder / "llm")}
    vlm = build_tiny(spec)
    apply_tuning(vlm.model, Tune.model_validate(tune), seed=0)
    return vlm, config.vocab_size


@pytest.mark.parametrize("llm", [LLAMA, {**LLAMA, "tie_word_embeddings": False}, PHI], ids=["tied", "untied", "bias"])
@pytest.mark.parametrize("tuning", [{"embeddings": {}}, {"lora": {"r": 2, "new_tokens": True}}], ids=["alone", "lora"])
def test_embeddings_change_the_rows_of_new_tokens_and_not_one_bit_more(llm: dict, tuning: dict, tmp_path: Path) -> None:
    tune = {"llm": {**tuning, "lr": 0.1}, "connector": "frozen"}
    vlm, rows = build_with_new_tokens(tune, llm, tmp_path)
    model = vlm.model
    assert model.config.new_tokens == list(range(rows, rows + 3))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    decayed = set(before)
    groups = make_parameter_groups(model, Tune.model_validate(tune), lr=1e-3, weight_decay=0.5, decayed=decayed)
    optimizer = torch.optim.AdamW(groups)
    ids = torch.tensor([[5, 6, rows, rows + 1, rows + 2, 7, rows]])
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    tables = {"model.language_model.embed_tokens.weight"} | ({"lm_head.weight"} - {llm.get("tie_word_embeddings")})
    tables = tables if not llm.get("tie_word_embeddings") else {"model.language_model.embed_tokens.weight"}
    for name, parameter in model.named_parameters():
        if name in tables:
            assert torch.equal(parameter[:rows], before[name][:rows]), name
            assert (parameter[rows:] != before[name][rows:]).any(dim=1).all(), name
        elif ".lora_" not in name:
            assert torch.equal(parameter, before[name]), name
    assert any(".lora_" in name for name in before) == ("lora" in tuning)


def test_the_image_token_in_a_spare_row_is_new(tmp_path: Path) -> None:
    base = build_tiny()
    assert base.model.config.new_tokens == []  # made with the model: nothing is newer than the rest
    names = [token for token in base.tokenizer.get_vocab() if token != "<image>"]
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, "</s>")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    config = base.model.config.text_config
    config.vocab_size = len(names) + 60
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    tune = Tune.model_validate({"llm": "embeddings", "connector": "frozen"})
    model = build_tiny({**tiny_model(), "llm": str(tmp_path)}).model
    assert model.config.new_tokens == [len(names)] == [model.config.image_token_id]
    rows = {row.part: row for row in apply_tuning(model, tune, seed=0)}
    assert rows["llm"].trainable == config.hidden_size


def test_new_tokens_are_known_in_a_next_stage(tmp_path: Path) -> None:
    vlm, rows = build_with_new_tokens({"llm": "embeddings"}, LLAMA, tmp_path)
    checkpoint.save(vlm, tmp_path / "c")
    again = checkpoint.load(tmp_path / "c")
    assert again.model.config.new_tokens == list(range(rows, rows + 3))


def test_tunings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="every part is frozen"):
        tune_tiny({"connector": "frozen"})
    with pytest.raises(UserError, match=r"LoRA targets 'nothing' match nothing in the LLM \(layers\.0"):
        tune_tiny({"llm": {"lora": {"targets": "nothing"}}})
    with pytest.raises(UserError, match=r"lora_dropout is 0.0 for the vision_tower and 0.1 for the llm"):
        tune_tiny({"llm": {"lora": {"dropout": 0.1}}, "vision_tower": "lora"})
    with pytest.raises(
        UserError, match=r"use_dora is True for the vision_tower and False for the llm, but peft has one"
    ):
        tune_tiny({"llm": "lora", "vision_tower": {"lora": {"use_dora": True}}})
    with pytest.raises(UserError, match="are not a regular expression"):
        tune_tiny({"llm": {"lora": {"targets": "(q_proj"}}})
    with pytest.raises(UserError, match="the LLM has no new tokens"):
        tune_tiny({"llm": "embeddings"})
    with pytest.raises(UserError, match="the vision tower has no new tokens"):
        tune_tiny({"vision_tower": {"lora": {"new_tokens": True}}})
    with pytest.raises(UserError, match=r"LoraConfig has no field 'use_dorra'; did you mean 'use_dora'\?"):
        make_lora_config({"llm": Selection(lora_targets=["q"], lora={"r": 1, "lora_alpha": 1, "use_dorra": True})})
