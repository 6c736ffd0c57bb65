"""Three tunings become requires_grad, one LoraConfig and the optimiser's groups, in any mix."""

import pytest

from tests.conftest import CLIP, DINOV2, LLAMA, PHI, SIGLIP, tiny_model
from tinyllava.config import ModelSpec, Tune
from tinyllava.data.sample import Sample
from tinyllava.errors import UserError
from tinyllava.model.build import build
from tinyllava.train.tune import apply_tuning, parameter_groups

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
SAMPLE = {"id": "a", "image": "a.png", "conversations": TURNS}


def tuned(tune: dict, **parts):
    model, *_ = build(ModelSpec.model_validate(tiny_model(**parts)), lambda: [Sample.from_llava(SAMPLE)])
    rows = apply_tuning(model, Tune.model_validate(tune), seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return model, {row.part: row for row in rows}, trained


def test_frozen_trains_the_connector_alone() -> None:
    _, rows, trained = tuned({})
    assert trained == {f"model.multi_modal_projector.linear_{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")}
    assert rows["connector"].trainable == rows["connector"].parameters > 0 == rows["llm"].trainable


@pytest.mark.parametrize(
    "tower,layers", [(CLIP, "encoder.layers"), (SIGLIP, "encoder.layers"), (DINOV2, "encoder.layer")]
)
def test_partial_finds_the_last_used_layers_of_any_tower(tower: dict, layers: str) -> None:
    _, _, trained = tuned({"vision_tower": {"partial": {"last": 1}}, "connector": "frozen"}, tower=tower)
    # three layers, features from before the last one: the last layer in use is number 1
    assert trained and all(name.startswith(f"model.vision_tower.{layers}.1.") for name in trained)


@pytest.mark.parametrize("llm", [LLAMA, PHI], ids=lambda config: config["model_type"])
def test_partial_finds_the_last_layers_of_any_llm(llm: dict) -> None:
    _, _, trained = tuned({"llm": {"partial": {"last": 1}}, "connector": "frozen"}, llm=llm)
    assert trained and all(name.startswith("model.language_model.layers.1.") for name in trained)
    with pytest.raises(UserError, match="last 3 layers, but it has 2 in use"):
        tuned({"llm": {"partial": {"last": 3}}}, llm=llm)


@pytest.mark.parametrize("tower", [CLIP, SIGLIP, DINOV2], ids=lambda config: config["model_type"])
def test_full_trains_what_the_features_depend_on(tower: dict) -> None:
    _, rows, trained = tuned({"vision_tower": "full", "connector": "frozen"}, tower=tower)
    assert not any(word in name for name in trained for word in (".2.", "head", "post_layernorm", "mask_token"))
    assert 0 < rows["vision_tower"].trainable < rows["vision_tower"].parameters


def test_full_of_an_untied_llm_trains_its_head() -> None:
    assert "lm_head.weight" in tuned({"llm": "full"}, llm={**LLAMA, "tie_word_embeddings": False})[2]
    assert "lm_head.bias" in tuned({"llm": "full"}, llm=PHI)[2]


def test_each_part_has_its_own_lora() -> None:
    tune = {
        "llm": {"lora": {"r": 8, "alpha": 16}},
        "vision_tower": {"lora": {"r": 2, "alpha": 6, "targets": "attention"}},
        "connector": "full",
    }
    model, _, trained = tuned(tune)
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
    model, _, trained = tuned(tune)
    decayed = {name for name in trained if name.endswith("weight") and "norm" not in name}
    groups = parameter_groups(model, Tune.model_validate(tune), lr=1e-3, weight_decay=0.1, decayed=decayed)
    rates = {group["part"]: group["lr"] for group in groups}
    assert rates == {"llm": 1e-5, "vision_tower": 1e-6, "connector": 1e-3}
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_tunings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="every part is frozen"):
        tuned({"connector": "frozen"})
    with pytest.raises(UserError, match=r"LoRA targets 'nothing' match nothing in the llm \(layers\.0"):
        tuned({"llm": {"lora": {"targets": "nothing"}}})
    with pytest.raises(UserError, match="dropouts differ"):
        tuned({"llm": {"lora": {"dropout": 0.1}}, "vision_tower": "lora"})
