"""Every LLM family: inside the model it computes what it computes alone, and its tokenizer's own format is exact."""

from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import LLAMA, SIGLIP, tiny_model
from tests.llms.tiny_llms import LLMS
from tests.tiny_session import WORDS, corpus
from tests.tiny_vlm import build_tiny
from tinyllava.commands.split import write_llm
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.model.build import get_default_template
from tinyllava.model.head import probe_head

HEADS = {  # what stands between the last hidden state and the logits, where it is not a plain linear layer
    "phi": {"head_bias": True, "head_scale": 1.0},
    "granite": {"head_bias": False, "head_scale": 0.25},
    "cohere": {"head_bias": False, "head_scale": 0.25},
    "gemma2": {"head_bias": False, "head_softcap": 30.0},
}
PLAIN = {"head_bias": False, "head_scale": 1.0}
OWN_TEMPLATES = {"phi": "phi", "llama": "llama", "gemma": "gemma", "qwen2": "qwen2_base", "stablelm": "phi"}
OWN_TEMPLATES |= {"openelm": "llama"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that does not know <image>."""
    folder, specials = tmp_path_factory.mktemp("tokenizer"), ["<s>", "</s>", "<pad>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(WORDS, vocab_size=300, special_tokens=specials, show_progress=False)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), specials, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **names).save_pretrained(folder)
    return folder


def stand_alone(family: str, dtype: torch.dtype = torch.float32, vocab_size: int = 330) -> torch.nn.Module:
    """A tiny LLM whose every weight is random, norms and biases included."""
    fields = {**LLMS[family], "vocab_size": vocab_size, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    Factory("llms").import_file(fields["model_type"])
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return llm.to(dtype)


@pytest.mark.parametrize("family", LLMS)
@pytest.mark.parametrize("spare", [0, 9])
def test_in_the_model_it_computes_what_it_computes_alone(
    family: str, spare: int, tokenizer: Path, tmp_path: Path
) -> None:
    """Read from a directory, with a picture before the text, from the same embeddings: with rows to spare for the
    token <image>, or without, so that its embeddings and head are made larger.
    """
    rows = len(AutoTokenizer.from_pretrained(tokenizer)) + spare
    llm = stand_alone(family, vocab_size=rows)
    llm.save_pretrained(tmp_path)
    spec = {"llm": {"name": str(tmp_path), "tokenizer": str(tokenizer)}, "vision_tower": {"config": SIGLIP}}
    spec |= {"connector": "mlp2x_gelu", "template": "llama"}
    vlm = build_tiny(spec)
    model, processor = vlm.model.eval(), vlm.processor
    words = processor.tokenizer(WORDS[1], return_tensors="pt").input_ids
    ids = torch.cat([torch.full((1, processor.tokens_per_image), model.config.image_token_id), words], dim=1)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        image = model.model.get_image_features(pixels).pooler_output[0][None]
        embeddings = torch.cat([image, llm.get_input_embeddings()(words)], dim=1)
        wanted = llm(inputs_embeds=embeddings).logits
        logits = model(input_ids=ids, pixel_values=pixels).logits
    assert logits.shape[-1] == rows + (spare == 0)
    torch.testing.assert_close(logits[..., :rows], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", LLMS)
def test_what_its_head_does_is_found_by_comparing_logits(family: str, dtype: torch.dtype) -> None:
    """Also in bfloat16, where a soft cap of 30 changes an ordinary logit less than rounding does."""
    llm = stand_alone(family, dtype)
    assert probe_head(llm) == HEADS.get(family, PLAIN)


def test_a_head_that_cannot_be_held_is_refused() -> None:
    llm = stand_alone("llama")
    own = llm.forward

    def forward(*args, **kwargs):
        outputs = own(*args, **kwargs)
        outputs.logits = outputs.logits.sort(dim=-1).values
        return outputs

    llm.forward = forward
    with pytest.raises(
        UserError, match=r"LlamaForCausalLM changes its logits in a way that the model class cannot hold"
    ):
        probe_head(llm)


@pytest.mark.parametrize("family", LLMS)
def test_the_template_when_none_is_named(family: str) -> None:
    """The original's for the families it had; whoever has a chat template of its own speaks that."""
    Factory("llms").import_file(LLMS[family]["model_type"])
    config = AutoConfig.for_model(LLMS[family]["model_type"])
    wanted = OWN_TEMPLATES.get(config.model_type, "native")
    assert get_default_template(config) == wanted
    assert wanted == "native" or wanted in Factory("templates").list_names()


def test_a_family_may_say_what_random_weights_begin_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only these: a model that is loaded keeps its own."""
    monkeypatch.setattr(Factory("llms"), "registered", {})  # building registers the family for this process
    spec = {"name": None, "config": {**LLAMA, "num_key_value_heads": 4}, "family": "tinyllava.llms.llama:Copying"}
    vlm = build_tiny(tiny_model() | {"llm": {**spec, "tokenizer": {}}}, corpus())
    model = vlm.model
    heads = [layer.self_attn for layer in model.model.language_model.layers]
    assert all(torch.equal(head.k_proj.weight, head.q_proj.weight) for head in heads)
    assert all(torch.equal(head.o_proj.weight, head.v_proj.weight.T) for head in heads)
    heads[0].k_proj.weight.data.zero_()
    write_llm(model, tmp_path)
    vlm.tokenizer.save_pretrained(tmp_path)
    again = {"name": str(tmp_path), "family": spec["family"]}
    loaded = build_tiny(tiny_model() | {"llm": again}).model
    assert not loaded.model.language_model.layers[0].self_attn.k_proj.weight.any()
