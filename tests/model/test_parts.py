"""Parts from where they are: an LLM in a GGUF file, the tower of a Llava checkpoint, weights that are not all there."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.conftest import CLIP, DINOV2, SIGLIP, tiny_model
from tests.tiny_session import tiny_session
from tests.tiny_vlm import build_tiny
from tinyllava import checkpoint
from tinyllava import gguf_files as gguf
from tinyllava.errors import UserError
from tinyllava.model.parts import load_named, make_part_config

HEADS, DIM = 4, 32


def to_llama_cpp(weight: torch.Tensor) -> np.ndarray:
    """A query or key projection in llama.cpp's order, which rotates neighbours where transformers rotates halves."""
    return weight.view(HEADS, 2, DIM // HEADS // 2, DIM).transpose(1, 2).reshape(DIM, DIM).contiguous().numpy()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": DIM, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    return LlamaForCausalLM(LlamaConfig(vocab_size=260, max_position_embeddings=128, **sizes)).eval()


@pytest.fixture(scope="module")
def gguf_file(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same Llama in a GGUF file, with a byte-level BPE tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(DIM)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(llama.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    state = llama.state_dict()
    for ours, theirs in {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}.items():
        writer.add_tensor(f"{theirs}.weight", state[f"{ours}.weight"].numpy())
    for layer in range(2):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            array = to_llama_cpp(weight) if theirs in ("attn_q", "attn_k") else weight.numpy()
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_llm_from_a_gguf_file_is_the_same_llm_and_can_be_trained(llama: LlamaForCausalLM, gguf_file: Path) -> None:
    directory = gguf.convert_gguf(gguf_file)
    ids = torch.arange(20).unsqueeze(0)
    read = AutoModelForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(read(ids).logits, llama(ids).logits)
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert gguf.convert_gguf(gguf_file) == directory and (directory / "model.safetensors").stat().st_mtime_ns == written
    spec = {**tiny_model(tower=SIGLIP), "llm": str(gguf_file)}
    vlm = build_tiny(spec)
    assert not hasattr(vlm.model.config.text_config, "quantization_config")
    assert vlm.tokenizer("ab")["input_ids"][-1] == 259 and vlm.model.config.image_token_id >= 260


def test_a_gguf_file_that_is_not_there_or_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"GGUF file .*absent\.gguf not found"):
        build_tiny({**tiny_model(), "llm": str(tmp_path / "absent.gguf")})
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no GGUF at all")
    monkeypatch.setattr(gguf, "is_gguf_available", lambda: False)
    with pytest.raises(UserError, match=r"reading broken\.gguf requires .*tinyllava-factory\[gguf\]"):
        gguf.convert_gguf(broken)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"cannot read .*broken\.gguf as a GGUF model"):
        gguf.convert_gguf(broken)


@pytest.mark.parametrize(
    "tower", [SIGLIP, {"model_type": "mof", "first": CLIP, "second": DINOV2}], ids=["siglip", "mof"]
)
def test_a_tower_out_of_a_llava_checkpoint(tower: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = tiny_session(tower=tower)
    checkpoint.save(first.vlm, tmp_path / "first")
    spec = {**tiny_model(), "vision_tower": {"name": str(tmp_path / "first"), "feature_layer": -1}}
    vlm = build_tiny(spec)
    pairs = zip(first.model.model.vision_tower.parameters(), vlm.model.model.vision_tower.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert vlm.processor.image_processor.size == first.processor.image_processor.size
    assert "start random" not in caplog.text


def test_weights_that_a_part_lacks_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tower = AutoModel.from_config(tiny_session(tower=SIGLIP).model.config.vision_config)
    tower.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in state if name.endswith("layers.1.mlp.fc1.weight"))
    save_file({name: t for name, t in state.items() if name != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "siglip_vision_model"
    with caplog.at_level(logging.WARNING, logger="tinyllava"):
        build_tiny({**tiny_model(), "vision_tower": str(tmp_path)})
    assert "1 weights are missing in" in caplog.text and "mlp.fc1.weight" in caplog.text


def test_a_config_that_transformers_refuses_is_an_error_in_a_line() -> None:
    for fields, problem in (
        ({"hidden_size": "big"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_size": 33, "num_attention_heads": 2}, "not a multiple of the number of attention heads"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            make_part_config("llm", {"model_type": "llama", **fields})
        assert str(error.value).startswith("model.llm.config: ") and "\n" not in str(error.value)


def test_a_tokenizer_that_the_library_refuses_is_an_error_in_a_line(tmp_path: Path) -> None:
    """The tokenizers library raises plain `Exception`."""
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": 5}, "added_tokens": []}')
    with pytest.raises(UserError, match=r"cannot load the tokenizer .*: ") as caught:
        load_named("tokenizer", str(tmp_path), AutoTokenizer.from_pretrained)
    assert "\n" not in str(caught.value)
