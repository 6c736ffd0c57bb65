"""OpenELM: Apple's sizes, names and mathematics, and everything an LLM of this package must do."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.conftest import tiny_model
from tests.tiny_session import WORDS, corpus
from tests.tiny_vlm import build_tiny
from tinyllava import checkpoint
from tinyllava.config import Tune
from tinyllava.data.sample import Message, Sample
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.infer import Session
from tinyllava.model.head import probe_head
from tinyllava.train.tune import apply_tuning

Factory("llms").get("openelm")  # makes its classes known to the Auto classes, which some tests use alone

TINY = {
    "model_type": "openelm",
    "model_dim": 32,
    "head_dim": 8,
    "num_transformer_layers": 3,
    "qkv_multipliers": [0.5, 1.0],
    "ffn_multipliers": [0.5, 4.0],
    "num_gqa_groups": 2,
    "ffn_dim_divisor": 16,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
}
VARIANTS = {
    "apple": {},
    "untied": {"share_input_output_layers": False},
    "plain": {"normalize_qk_projections": False, "ffn_with_glu": False, "num_gqa_groups": 1, "qkv_multipliers": 1.0},
}
OPENELM_270M = {  # the ranges of apple/OpenELM-270M's config.json
    "model_dim": 1280,
    "head_dim": 64,
    "num_transformer_layers": 16,
    "qkv_multipliers": [0.5, 1.0],
    "ffn_multipliers": [0.5, 4.0],
    "num_gqa_groups": 4,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
}


def tiny(attn_implementation: str = "sdpa", **more: object):
    """A model whose every weight is random, norms included."""
    fields = {**TINY, "vocab_size": 96, "initializer_range": 0.2, **more}
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields), attn_implementation=attn_implementation
    )
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return llm.eval()


def reference(state: dict[str, Tensor], fields: dict, heads: list[tuple[int, int]], ids: Tensor) -> Tensor:
    """Logits [L, V] of ids [L], from Apple's weights: head by head, query by query, rotation as complex numbers."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * state[name] if name in state else x

    def rotated(x: Tensor) -> Tensor:  # [E] at each position
        half = x.shape[-1] // 2
        angles = torch.arange(len(x)).unsqueeze(1) * 10000 ** (-torch.arange(half) / half)
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    x, size = state["transformer.token_embeddings.weight"][ids], fields["head_dim"]
    for layer, (queries, keys) in enumerate(heads):
        at = f"transformer.layers.{layer}."
        rows = (norm(x, f"{at}attn_norm.weight") @ state[f"{at}attn.qkv_proj.weight"].T).split(size, dim=-1)
        assert len(rows) == queries + 2 * keys
        outputs = []
        for head in range(queries):
            group = head // (queries // keys)
            q = rotated(norm(rows[head], f"{at}attn.q_norm.weight"))
            k = rotated(norm(rows[queries + group], f"{at}attn.k_norm.weight"))
            v = rows[queries + keys + group]
            seen = [F.softmax(k[: now + 1] @ q[now] / size**0.5, dim=0) @ v[: now + 1] for now in range(len(ids))]
            outputs.append(torch.stack(seen))
        x = x + torch.cat(outputs, dim=-1) @ state[f"{at}attn.out_proj.weight"].T
        inner = norm(x, f"{at}ffn_norm.weight") @ state[f"{at}ffn.proj_1.weight"].T
        width = state[f"{at}ffn.proj_2.weight"].shape[1]
        gated = F.silu(inner[:, :width]) * (inner[:, width:] if inner.shape[1] == 2 * width else 1.0)
        x = x + gated @ state[f"{at}ffn.proj_2.weight"].T
    head = state.get("lm_head.weight", state["transformer.token_embeddings.weight"])
    return norm(x, "transformer.norm.weight") @ head.T


def apple_directory(llm, directory: Path) -> Path:
    """A model in the files that Apple publishes: its names, its remote code named in the config, no tokenizer."""
    llm.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    remote = {"AutoConfig": "configuration_openelm.C", "AutoModelForCausalLM": "modeling_openelm.M"}
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": remote, "torch_dtype": "float32"}))
    return directory


def test_the_sizes_are_those_of_openelm_270m() -> None:
    config = AutoConfig.for_model("openelm", **OPENELM_270M)
    steps = [0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3, 3.53, 3.77, 4.0]
    assert config.ffn_multipliers == steps
    assert config.num_query_heads == [12] * 5 + [16] * 7 + [20] * 4
    assert config.num_kv_heads == [3] * 5 + [4] * 7 + [5] * 4
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() == 271_527_168
    again = AutoConfig.for_model(**config.to_dict())  # as Apple's config.json has them: worked out already
    assert again.num_query_heads == config.num_query_heads and again.hidden_size == 1280


def test_lists_that_do_not_fit_the_layers_are_refused() -> None:
    with pytest.raises(UserError, match="num_query_heads has 2 values for 3 layers"):
        AutoConfig.for_model(**{**TINY, "num_query_heads": [2, 4]})


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_references_and_the_files_apples(variant: str, tmp_path: Path) -> None:
    llm = tiny(**VARIANTS[variant])
    config = llm.config
    assert variant != "apple" or len(set(config.num_query_heads)) > 1  # layers do differ
    ids = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    state = load_file(apple_directory(llm, tmp_path) / "model.safetensors")
    layer = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2", "attn_norm", "ffn_norm")
    layer += ("attn.q_norm", "attn.k_norm") if config.normalize_qk_projections else ()
    names = {f"transformer.layers.{number}.{name}.weight" for number in range(3) for name in layer}
    names |= {"transformer.token_embeddings.weight", "transformer.norm.weight"}
    names |= set() if config.share_input_output_layers else {"lm_head.weight"}
    assert set(state) == names
    heads = list(zip(config.num_query_heads, config.num_kv_heads, strict=True))
    with torch.no_grad():
        wanted = torch.stack([reference(state, TINY, heads, row) for row in ids])
        for attention in ("sdpa", "eager"):
            loaded, info = AutoModelForCausalLM.from_pretrained(
                tmp_path, attn_implementation=attention, output_loading_info=True
            )
            assert not info["missing_keys"] and not info["unexpected_keys"]
            torch.testing.assert_close(loaded(ids).logits, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(loaded(ids, logits_to_keep=2).logits, wanted[:, -2:], atol=1e-4, rtol=1e-4)
        bare = AutoModel.from_pretrained(tmp_path)
        torch.testing.assert_close(bare(ids).last_hidden_state, loaded.transformer(ids).last_hidden_state)
    assert probe_head(llm) == {"head_bias": False, "head_scale": 1.0}


def test_generation_is_the_same_with_a_cache_and_in_a_padded_batch() -> None:
    llm = tiny(eos_token_id=None, pad_token_id=0)
    ids = torch.randint(1, 96, (9,), generator=torch.Generator().manual_seed(2))
    padded = torch.stack([torch.cat([ids.new_zeros(4), ids[:5]]), ids])
    mask = (torch.arange(9) >= torch.tensor([[4], [0]])).long()
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    together = llm.generate(padded, attention_mask=mask, **kwargs)[:, 9:]
    alone = [llm.generate(row[None], use_cache=False, **kwargs)[0, len(row) :] for row in (ids[:5], ids)]
    assert together.tolist() == [answer.tolist() for answer in alone]
    assert len({tuple(answer.tolist()) for answer in alone}) == 2


def test_packed_samples_do_not_see_each_other() -> None:
    llm = tiny()
    ids = torch.randint(1, 96, (1, 9), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = llm(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([llm(ids[:, :4]).logits, llm(ids[:, 4:]).logits], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    ids = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(4))
    gradients = []
    for checkpointing in (False, True):
        llm = tiny().train()
        if checkpointing:
            llm.gradient_checkpointing_enable()
        llm(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in llm.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys() and all(g is not None for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("tune", [{"llm": "full"}, {"llm": {"lora": {"r": 4, "alpha": 8}}}], ids=["full", "lora"])
def test_openelm_inside_llava_trains_saves_loads_and_answers(tune: dict, pictures: Path, tmp_path: Path) -> None:
    source = apple_directory(tiny(vocab_size=400), tmp_path / "OpenELM")
    llm = {"name": str(source), "tokenizer": {"vocab_size": 400}}
    vlm = build_tiny({**tiny_model(), "llm": llm, "template": None}, corpus())
    model, processor, template = vlm.model, vlm.processor, vlm.template
    assert template.name == "llama"
    stored = load_file(source / "model.safetensors")["transformer.token_embeddings.weight"]
    torch.testing.assert_close(model.get_input_embeddings().weight[:400], stored)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    apply_tuning(model, Tune.model_validate(tune), seed=0)
    model.train().gradient_checkpointing_enable()
    sample = Sample([Message("user", f"<image>\n{WORDS[0]}"), Message("assistant", WORDS[1])], ["x"])
    ids = processor.tokenizer(template.render(sample, processor.tokenizer)[0], return_tensors="pt").input_ids
    ids = ids.repeat_interleave(torch.where(ids[0] == model.config.image_token_id, processor.tokens_per_image, 1), 1)
    pixels = torch.randn(1, 3, 32, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, pixel_values=pixels, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(later < earlier for earlier, later in pairwise(losses))
    model.eval()
    checkpoint.save(vlm, tmp_path / "c")
    loaded = checkpoint.load(tmp_path / "c")
    assert not loaded.record["plain"]  # transformers alone could not read it
    with torch.no_grad():
        inputs = {"input_ids": ids, "pixel_values": pixels}
        torch.testing.assert_close(loaded.model(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    question = Sample([Message("user", f"<image>\n{WORDS[0]}")], [str(pictures / "3.png")])
    answers = [Session(each).generate([question], max_new_tokens=6) for each in (vlm, loaded)]
    assert answers[0] == answers[1]


def test_a_missing_tokenizer_is_asked_for(tmp_path: Path) -> None:
    source = apple_directory(tiny(), tmp_path / "OpenELM")
    with pytest.raises(UserError, match=r"tokenizer.*model\.llm\.tokenizer="):
        build_tiny({**tiny_model(), "llm": {"name": str(source)}})
