"""Connectors that change the number of tokens: exact counts, what they compute, and a whole life with any tower."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import CLIP, SIGLIP, tiny_model
from tests.tiny_session import WORDS, corpus
from tests.tiny_vlm import build_tiny
from tests.train.tiny_run import recipe
from tinyllava import checkpoint
from tinyllava.config import Tune
from tinyllava.data.sample import Message, Sample
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.infer import Session
from tinyllava.model.vlm import VLM
from tinyllava.train import stage
from tinyllava.train.tune import apply_tuning

QFORMER = {
    "num_queries": 6,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TINY = {  # of 16 patches
    "resampler": ({"num_queries": 5, "layers": 2}, 5),
    "qformer": (QFORMER, 6),
    "pixel_shuffle_mlp": ({"scale": 2}, 4),
    "mof_mlp": ({}, 32),
}
QUERIES = {"resampler": ("latents", 1.0), "qformer": ("query_tokens", 0.02)}
FULL = {"llm": "full", "vision_tower": "full", "connector": "full"}
LORA = {"llm": {"lora": {"r": 4, "alpha": 8}}, "connector": "full"}
ALL_LORA = {**LORA, "connector": {"lora": {"r": 2, "alpha": 4}}}


def build_with(name: str, tower: dict = CLIP, **options: object) -> VLM:
    connector = {name: {**TINY[name][0], **options}}
    return build_tiny(tiny_model(tower=tower, connector=connector), corpus())


def connector_of(name: str, vision_dim: int = 24, text_dim: int = 32, **options: object) -> nn.Module:
    return Factory("connectors").get(name)(vision_dim, text_dim, **options)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("patches", [16, 64])
def test_the_number_of_tokens_is_exact_and_says_nothing_of_other_pictures(name: str, patches: int) -> None:
    connector = connector_of(name, **TINY[name][0]).eval()
    features = torch.randn(3, patches, 24)
    with torch.no_grad():
        tokens = connector(features)
        assert tokens.shape == (3, connector.num_tokens(patches), 32)
        torch.testing.assert_close(connector(features[1:2]), tokens[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name,tune", [(name, tune) for name in TINY for tune in (FULL, LORA, ALL_LORA)])
def test_a_model_trains_saves_loads_and_answers(name: str, tune: dict, pictures: Path, tmp_path: Path) -> None:
    for number, tower in enumerate((CLIP, SIGLIP)):
        vlm = build_with(name, tower)
        model, processor, template = vlm.model, vlm.processor, vlm.template
        assert processor.tokens_per_image == model.config.image_seq_length == TINY[name][1]
        rows = apply_tuning(model, Tune.model_validate(tune), seed=0)
        assert all(row.trainable for row in rows if row.part != "vision_tower")
        sample = Sample([Message("user", f"<image>\n{WORDS[0]}"), Message("assistant", WORDS[1])], ["x"])
        ids = processor.tokenizer(template.render(sample, processor.tokenizer)[0], return_tensors="pt").input_ids
        counts = torch.where(ids[0] == model.config.image_token_id, processor.tokens_per_image, 1)
        inputs = {"input_ids": ids.repeat_interleave(counts, 1), "pixel_values": torch.randn(1, 3, 32, 32)}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        model.eval()  # the Q-Former's dropout would hide how the loss falls
        losses = []
        for _ in range(3):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            unreached = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert not unreached
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert all(later < earlier for earlier, later in pairwise(losses))
        directory = tmp_path / str(number)
        checkpoint.save(vlm, directory)
        loaded = checkpoint.load(directory)
        assert not loaded.record["plain"]
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
        question = Sample([Message("user", f"<image>\n{WORDS[0]}")], [str(pictures / "3.png")])
        answers = [Session(each).generate([question], max_new_tokens=5) for each in (vlm, loaded)]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("name", QUERIES)
def test_queries_keep_their_own_initialisation_and_the_seed_covers_them(name: str) -> None:
    attribute, std = QUERIES[name]
    spec = tiny_model(connector={name: {**TINY[name][0], "num_queries": 256}})
    drawn = []
    for seed, tower in ((1, CLIP), (1, SIGLIP), (2, CLIP)):
        spec["vision_tower"] = {"config": tower}
        model = build_tiny(spec, corpus(), seed=seed).model
        drawn.append(getattr(model.model.multi_modal_projector, attribute).detach().clone())
    assert drawn[0].std().item() == pytest.approx(std, rel=0.05)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", QUERIES)
def test_linear_layers_start_as_the_llms_do(name: str) -> None:
    spec = tiny_model(connector={name: TINY[name][0]})
    spec["llm"]["config"] = {**spec["llm"]["config"], "initializer_range": 0.3}
    model = build_tiny(spec, corpus()).model
    for layer in model.model.multi_modal_projector.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.3, rel=0.15)
            assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize("name", TINY)
def test_in_bfloat16_what_is_saved_is_what_is_loaded(name: str, tmp_path: Path) -> None:
    vlm = build_with(name)
    model = vlm.model.to(torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    checkpoint.save(vlm, tmp_path)
    loaded = checkpoint.load(tmp_path).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = [torch.stack(m.get_image_features(pixels).pooler_output) for m in (model, loaded)]
    torch.testing.assert_close(tokens[0], tokens[1], rtol=0, atol=0)


def test_a_run_with_gradient_checkpointing_and_text_only_samples(pictures: Path, tmp_path: Path) -> None:
    model = tiny_model(connector={"qformer": QFORMER})
    kwargs = {"max_steps": 2, "gradient_checkpointing": True}
    final = stage.run(recipe(pictures, model=model, stages=("finetune",), **kwargs), "tiny", tmp_path / "run")
    trained = checkpoint.load(final).model
    fresh = build_tiny(model, corpus()).model
    for (name, after), before in zip(
        trained.model.multi_modal_projector.named_parameters(),
        fresh.model.multi_modal_projector.parameters(),
        strict=True,
    ):
        # a key's bias shifts all scores of a query alike: softmax gives it no gradient
        assert name.endswith("key.bias") or not torch.equal(after, before), name


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pixel_shuffle_puts_a_square_of_patches_into_one_token(scale: int) -> None:
    connector = connector_of("pixel_shuffle_mlp", vision_dim=2, scale=scale)
    connector.mlp = nn.Identity()
    features = torch.arange(144.0)[:, None] + torch.tensor([0.0, 1000.0])  # patch number and channel
    tokens = connector(features[None])[0]
    side = 12 // scale
    for token, (row, column) in enumerate((row, column) for row in range(side) for column in range(side)):
        inside = [12 * (row * scale + y) + column * scale + x for y in range(scale) for x in range(scale)]
        assert sorted(tokens[token].tolist()) == sorted([*inside, *(number + 1000 for number in inside)])


def test_mof_keeps_each_towers_channels_apart() -> None:
    connector = connector_of("mof_mlp", vision_dim=10, first_dim=4)
    features = torch.randn(1, 3, 10)
    with torch.no_grad():
        tokens = connector(features)
        torch.testing.assert_close(tokens[:, 0::2], connector.first(features[..., :4]))
        torch.testing.assert_close(tokens[:, 1::2], connector.second(features[..., 4:]))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"scale 3 does not divide the grid of 4 x 4 patches.*Scales that do: 2, 4"):
        build_with("pixel_shuffle_mlp", scale=3)
    with pytest.raises(UserError, match=r"square grid of patches, found 17 features.*feature_strategy: patch"):
        spec = tiny_model(connector="pixel_shuffle_mlp")
        spec["vision_tower"]["feature_strategy"] = "cls_patch"
        build_tiny(spec, corpus())
    with pytest.raises(UserError, match="scale must be at least 1, found 0"):
        connector_of("pixel_shuffle_mlp", scale=0)
    with pytest.raises(UserError, match="25 channels cannot be split into two equal halves"):
        connector_of("mof_mlp", vision_dim=25)
    with pytest.raises(UserError, match="first_dim 24 leaves no second tower in 24 channels"):
        connector_of("mof_mlp", first_dim=24)
    with pytest.raises(UserError, match=r"no option 'num_layers'.*num_hidden_layers"):
        connector_of("qformer", num_layers=3)
    with pytest.raises(UserError, match="hidden_size 100 is not a multiple of num_attention_heads 12"):
        connector_of("qformer", hidden_size=100)


def test_the_qformers_defaults_are_bert_base_reading_the_features_in_even_layers() -> None:
    with torch.device("meta"):
        connector = connector_of("qformer", 1152, 2560)
    layers = connector.qformer.encoder.layer
    assert [layer.has_cross_attention for layer in layers] == [True, False] * 6
    assert layers[0].crossattention.attention.key.weight.shape == (768, 1152)
    assert layers[0].intermediate_query.dense.weight.shape == (3072, 768)
    assert connector.num_tokens(729) == 128
