"""OpenELM (arXiv 2404.14619): Apple's LLMs whose layers differ in their number of heads and in the width of their FFN.

transformers does not have OpenELM, so its classes are defined here. Importing this file registers them, and the Auto
classes then read Apple's directories without remote code. Apple publishes no tokenizer. Give Llama-2's:

    model:
      llm: {name: apple/OpenELM-450M-Instruct, tokenizer: meta-llama/Llama-2-7b-hf}

Shapes: B batch, L positions, D model_dim, H heads (queries, then keys, then values), E head_dim.
"""

from typing import Literal

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

from tinyllava.errors import UserError


class LLM:
    """What transformers cannot know about this family."""

    template = "llama"


@strict
class OpenELMConfig(PreTrainedConfig):
    """Apple's fields under Apple's names, and every layer's size computed from them (section 2.1 of the paper).

    `qkv_multipliers` and `ffn_multipliers` are one number for all layers, or two for the first and the last layer with
    even steps between. Lists of one value for each layer are used as they are. Raises UserError for any other length.
    """

    model_type = "openelm"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012 (transformers' own name for it)
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
        "tie_word_embeddings": "share_input_output_layers",
    }

    vocab_size: int = 32000
    max_context_length: int = 2048
    num_transformer_layers: int = 12
    model_dim: int = 2048
    head_dim: int = 128
    qkv_multipliers: int | float | list[int | float] = 1.0
    num_query_heads: list[int] | None = None
    num_gqa_groups: int = 1  # query heads that share a key and a value
    num_kv_heads: list[int] | None = None
    ffn_multipliers: int | float | list[int | float] = 4.0
    ffn_with_glu: bool = True
    ffn_dim_divisor: int = 256
    activation_fn_name: str = "swish"
    normalization_layer_name: Literal["rms_norm"] = "rms_norm"
    normalize_qk_projections: bool = False
    share_input_output_layers: bool = False
    rope_freq_constant: int | float = 10000
    rope_max_length: int = 4096
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)  # first: it sets fields that were given under transformers' names
        layers = self.num_transformer_layers
        self.ffn_multipliers = spread_multipliers(self.ffn_multipliers, layers)
        if self.num_query_heads is None:
            divisor = self.head_dim * self.num_gqa_groups
            scales = spread_multipliers(self.qkv_multipliers, layers)
            widths = [round_to_multiple(self.model_dim * scale, divisor) for scale in scales]
            self.num_query_heads = [width // self.head_dim for width in widths]
        if self.num_kv_heads is None:
            self.num_kv_heads = [heads // self.num_gqa_groups for heads in self.num_query_heads]
        for name in ("ffn_multipliers", "num_query_heads", "num_kv_heads"):
            if len(getattr(self, name)) != layers:
                raise UserError(
                    f"openelm: {name} has {len(getattr(self, name))} values for {layers} layers."
                    " Give one value for each layer, or leave it out."
                )


def spread_multipliers(scale: float | list[float], layers: int) -> list[float]:
    """One multiplier for each layer: the same for all, or even steps from the first to the last, to two decimals."""
    if not isinstance(scale, list):
        return [scale] * layers
    return [round(float(step), 2) for step in np.linspace(*scale, layers)] if len(scale) == 2 else scale


def round_to_multiple(width: float, divisor: int) -> int:
    """The multiple of `divisor` that is nearest to `width`, but at least 0.9 of it (MobileNet's rule)."""
    closest = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return closest + divisor if closest < 0.9 * width else closest


class OpenELMRotaryEmbedding(nn.Module):
    """Llama's rotary embedding in fp32, as Apple computes it.

    Computed at each call: a buffer would lose its values where the model is created on the meta device.
    """

    def __init__(self, config: OpenELMConfig):
        super().__init__()
        self.head_dim, self.base = config.head_dim, config.rope_freq_constant

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, L, E] of positions [B, L]: those of the pair (i, i + E / 2) are equal."""
        exponents = torch.arange(0, self.head_dim, 2, device=position_ids.device).float() / self.head_dim
        angles = (position_ids[:, :, None].float() / self.base**exponents).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


class OpenELMAttention(nn.Module):
    """Grouped-query attention with one projection for queries, keys and values, normalised before rotation."""

    def __init__(self, config: OpenELMConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        queries, keys = config.num_query_heads[layer_idx], config.num_kv_heads[layer_idx]
        self.heads = [queries, keys, keys]
        # transformers' attention functions read these two.
        self.num_key_value_groups = queries // keys
        self.is_causal = True
        self.qkv_proj = nn.Linear(config.model_dim, sum(self.heads) * self.head_dim, bias=False)
        self.out_proj = nn.Linear(queries * self.head_dim, config.model_dim, bias=False)
        normalized = config.normalize_qk_projections
        self.q_norm = llama.LlamaRMSNorm(self.head_dim) if normalized else nn.Identity()
        self.k_norm = llama.LlamaRMSNorm(self.head_dim) if normalized else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] -> [B, L, D], and the attention weights if the implementation returns them."""
        shape = hidden_states.shape[:-1]
        heads = self.qkv_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)  # [B, H, L, E]
        query, key, value = heads.split(self.heads, dim=1)
        rotated = llama.apply_rotary_pos_emb(self.q_norm(query), self.k_norm(key), *position_embeddings)
        query, key = (states.to(value.dtype) for states in rotated)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, llama.eager_attention_forward)
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.head_dim**-0.5, **kwargs
        )
        return self.out_proj(output.reshape(*shape, -1)), weights


class OpenELMFFN(nn.Module):
    """proj_2(act(gate) * up), where proj_1 gives gate and up side by side; without GLU proj_2(act(proj_1))."""

    def __init__(self, config: OpenELMConfig, layer_idx: int):
        super().__init__()
        width = round_to_multiple(config.ffn_multipliers[layer_idx] * config.model_dim, config.ffn_dim_divisor)
        self.gated = config.ffn_with_glu
        self.proj_1 = nn.Linear(config.model_dim, width * (1 + self.gated), bias=False)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False)
        self.act = ACT2FN[config.activation_fn_name]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        inner = self.proj_1(hidden_states)
        if not self.gated:
            return self.proj_2(self.act(inner))
        gate, up = inner.chunk(2, dim=-1)
        return self.proj_2(self.act(gate) * up)


class OpenELMLayer(GradientCheckpointingLayer):
    """Attention and FFN, each on normalised input and with a residual connection."""

    def __init__(self, config: OpenELMConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = llama.LlamaRMSNorm(config.model_dim)
        self.attn = OpenELMAttention(config, layer_idx)
        self.ffn_norm = llama.LlamaRMSNorm(config.model_dim)
        self.ffn = OpenELMFFN(config, layer_idx)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        hidden_states = hidden_states + self.attn(self.attn_norm(hidden_states), **kwargs)[0]
        return hidden_states + self.ffn(self.ffn_norm(hidden_states))


class OpenELMPreTrainedModel(llama.LlamaPreTrainedModel):
    """What transformers must know about the family."""

    config: OpenELMConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "token_embeddings"
    _no_split_modules = ("OpenELMLayer",)
    _can_record_outputs = {"hidden_states": OpenELMLayer, "attentions": OpenELMAttention}  # noqa: RUF012


class OpenELMModel(OpenELMPreTrainedModel, llama.LlamaModel):
    """The LLM without its head: Llama's forward through OpenELM's layers."""

    def __init__(self, config: OpenELMConfig):
        OpenELMPreTrainedModel.__init__(self, config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(OpenELMLayer(config, number) for number in range(config.num_transformer_layers))
        self.norm = llama.LlamaRMSNorm(config.model_dim)
        self.rotary_emb = OpenELMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The embeddings under Llama's name."""
        return self.token_embeddings


class OpenELMForCausalLM(OpenELMPreTrainedModel, llama.LlamaForCausalLM):
    """The LLM with its head. With `share_input_output_layers`, the head is the embedding table."""

    _tied_weights_keys = {"lm_head.weight": "transformer.token_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: OpenELMConfig):
        OpenELMPreTrainedModel.__init__(self, config)
        self.transformer = OpenELMModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    @property
    def model(self) -> OpenELMModel:
        """The LLM without its head, under Llama's name."""
        return self.transformer


AutoConfig.register(OpenELMConfig.model_type, OpenELMConfig, exist_ok=True)
AutoModel.register(OpenELMConfig, OpenELMModel, exist_ok=True)
AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)
