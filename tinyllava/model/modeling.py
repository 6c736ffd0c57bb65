"""The model: transformers' Llava, plus what it cannot hold or does not do.

In memory every model is this class. What it adds: any connector, an LLM head with a bias or a scale (Phi-2, Granite,
Gemma2), head and loss on supervised positions only, a frozen tower that runs without autograd and stops at the layer
that is used, pixels that arrive as uint8. On disk a checkpoint is plain `llava` wherever that is exact (checkpoint.py).

Shapes: B batch, L positions, I images, N tower tokens, P patches, T image tokens, Dv tower width, D LLM width, V
vocabulary.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModel, LlavaPreTrainedModel

from tinyllava.factory import Factory
from tinyllava.vision_towers import size_options

IGNORE = -100
# Supervised positions whose logits exist at once: 4096 x 256k x 4 bytes = 4 GB for Gemma's vocabulary.
LOSS_CHUNK = 4096


@strict
class TinyLlavaConfig(LlavaConfig):
    """Llava's config and what Llava has no place for."""

    # The original's own checkpoints say "tinyllava": those are read by key mapping (legacy.py), not by this class.
    model_type = "tiny_llava"

    connector: dict | None = None  # {name: options}
    prefix_tokens: int = 1  # CLS and registers before the tower's patches; dropped when the strategy is "default"
    head_bias: bool = False
    head_scale: float = 1.0
    head_softcap: float | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    # Pixels a side after preprocessing; a tower with interpolated positions may differ from its config.
    image_size: int = 336

    # What the original TinyLLaVA Factory did, for its checkpoints (legacy.py):
    drop_first_patch: bool = False  # it took the first patch of a tower without CLS for one: 728 of SigLIP's 729
    image_scale: float = 1.0  # Gemma scaled all that came into it, image tokens too: by the root of its width
    head_rows: int | None = None  # rows of its head, when <image> got one of its own beyond them: no part of any answer

    @staticmethod
    def own_fields() -> tuple[str, ...]:
        """Names of the fields that Llava's config lacks."""
        return tuple(TinyLlavaConfig.__annotations__)

    @property
    def num_patches(self) -> int:
        """Features an image gives the connector."""
        patches = (self.image_size // self.vision_config.patch_size) ** 2
        return patches + self.prefix_tokens - self.dropped_tokens

    @property
    def dropped_tokens(self) -> int:
        """Leading tokens of the tower that the connector never sees."""
        return self.prefix_tokens + self.drop_first_patch if self.vision_feature_select_strategy == "default" else 0


def find_blocks(module: nn.Module) -> list[str]:
    """Names of the repeated layers of a tower or an LLM, in order: its longest list of modules of one class."""
    lists = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len({type(layer) for layer in child}) == 1
    ]
    if not lists:
        return []
    name, blocks = max(lists, key=lambda item: len(item[1]))
    return [f"{name}.{index}" for index in range(len(blocks))]


class _Reached(Exception):
    """Raised inside a frozen tower when the wanted hidden state exists; nothing above it needs to run."""


@contextmanager
def _stop_before(block: nn.Module, found: list[Tensor]) -> Iterator[None]:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


def states_at(tower: nn.Module, pixel_values: Tensor, indices: list[int], whole: bool) -> list[Tensor]:
    """Hidden states `indices` of a tower (0: embeddings, k: output of layer k): [I, 3, H, W] -> [I, N, Dv] each.

    Unless `whole`, nothing above a single one is run. A mixture gives one: its towers' patches, joined on channels.
    """
    if hasattr(tower, "members"):
        features = [
            torch.cat([state[:, prefix:] for state in states_at(member, pixels, own, whole)], dim=-1)
            for member, pixels, own, prefix in tower.members(pixel_values, indices)
        ]
        return [torch.cat(features, dim=-1)]
    options = size_options(tower.config, pixel_values)
    if not whole and len(indices) == 1 and indices[0] < tower.config.num_hidden_layers:
        found: list[Tensor] = []
        with _stop_before(tower.get_submodule(find_blocks(tower)[indices[0]]), found):
            tower(pixel_values, **options)
        return found
    hidden_states = tower(pixel_values, output_hidden_states=True, **options).hidden_states
    return [hidden_states[index] for index in indices]


class TinyLlavaModel(LlavaModel):
    """Vision tower, connector (under Llava's name, multi_modal_projector) and language model without its head."""

    config: TinyLlavaConfig

    def __init__(self, config: TinyLlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
        ((name, options),) = config.connector.items()
        connector, options = Factory("connectors").resolve(name, options)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = connector(
            config.vision_config.hidden_size * layers, config.text_config.hidden_size, **options
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def used_tower_parameters(self) -> set[str]:
        """The tower's parameters that its features depend on: no layer above the feature layer, no head, no mask token.

        Seen by a backward pass through a twin without weights, so that it holds for any tower.
        """
        with torch.device("meta"):
            twin = AutoModel.from_config(copy.deepcopy(self.config.vision_config))
            pixels = torch.zeros(1, 3, self.config.image_size, self.config.image_size)
        options = size_options(self.config.vision_config, pixels)
        states = twin(pixels, output_hidden_states=True, **options).hidden_states
        sum(states[index].sum() for index in self._layer_indices()).backward()
        return {name for name, parameter in twin.named_parameters() if parameter.grad is not None}

    def _layer_indices(self) -> list[int]:
        """Indices into the tower's hidden states (0: embeddings, k: output of layer k), counted from the front."""
        wanted = self.config.vision_feature_layer
        count = self.config.vision_config.num_hidden_layers + 1
        return [index % count for index in ([wanted] if isinstance(wanted, int) else wanted)]

    def tower_features(self, pixel_values: Tensor) -> Tensor:
        """Features of the chosen layer(s) without prefix tokens: [I, 3, H, W] -> [I, P, Dv * layers]."""
        parameter = next(self.vision_tower.parameters())
        if pixel_values.dtype == torch.uint8:  # normalised here, on the device, instead of in the data workers
            mean = torch.tensor(self.config.image_mean, device=pixel_values.device).view(1, 3, 1, 1)
            std = torch.tensor(self.config.image_std, device=pixel_values.device).view(1, 3, 1, 1)
            pixel_values = (pixel_values.float() / 255 - mean) / std
        pixel_values = pixel_values.to(parameter.dtype)
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.vision_tower.parameters())
        with nullcontext() if trained else torch.no_grad():
            states = states_at(self.vision_tower, pixel_values, self._layer_indices(), whole=trained)
        return torch.cat([state[:, self.config.dropped_tokens :] for state in states], dim=-1)

    def get_image_features(self, pixel_values: Tensor, **kwargs: object) -> BaseModelOutputWithPooling:
        """Image tokens in the LLM's space as `pooler_output`: a tuple of I tensors [T, D]."""
        tokens = self.multi_modal_projector(self.tower_features(pixel_values))
        if self.config.image_scale != 1.0:
            tokens = tokens * self.config.image_scale
        return BaseModelOutputWithPooling(pooler_output=tuple(tokens))

    def idle_features(self) -> Tensor:
        """A zero that depends on every trained parameter of tower and connector.

        A batch without images must still give them a gradient (of zero): DDP, ZeRO-3 and FSDP wait for it on all
        ranks, and AdamW moves by its momentum on every step. Frozen unsharded towers are not run.
        """
        trained_tower = [p for p in self.vision_tower.parameters() if p.requires_grad or hasattr(p, "ds_id")]
        like = next(self.language_model.parameters())
        if trained_tower:
            size = self.config.image_size
            features = self.tower_features(torch.zeros(1, 3, size, size, device=like.device, dtype=like.dtype))
        else:
            width = self.config.vision_config.hidden_size * len(self._layer_indices())
            features = torch.zeros(1, self.config.num_patches, width, device=like.device, dtype=like.dtype)
        return 0.0 * self.multi_modal_projector(features).sum()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ):
        """Llava's forward; a training batch without images keeps tower and connector in the graph."""
        if pixel_values is None and input_ids is not None and self.training and torch.is_grad_enabled():
            idle = self.idle_features()
            if idle.requires_grad:
                inputs_embeds = self.get_input_embeddings()(input_ids)
                inputs_embeds, input_ids = inputs_embeds + idle.to(inputs_embeds.dtype), None
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs)


class TinyLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """The whole model. With `labels`, only the loss is computed, on supervised positions."""

    config: TinyLlavaConfig

    def __init__(self, config: TinyLlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = TinyLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=config.head_bias)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{self.embeddings_name()}.weight"}
        self.post_init()

    def embeddings_name(self) -> str:
        """What the LLM calls its input embeddings: `embed_tokens` in most, `wte` in GPT-2."""
        embeddings = self.model.language_model.get_input_embeddings()
        return next(name for name, module in self.model.language_model.named_modules() if module is embeddings)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], with the LLM's own bias, scale and soft cap."""
        logits = self.lm_head(hidden)
        if self.config.head_scale != 1.0:
            logits = logits * self.config.head_scale
        if self.config.head_softcap is not None:
            logits = torch.tanh(logits / self.config.head_softcap) * self.config.head_softcap
        if self.config.head_rows is not None:
            logits[..., self.config.head_rows :] = -torch.inf
        return logits

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,  # named, so that `generate` makes them: learned ones must not count padding
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: object,
    ) -> LlavaCausalLMOutputWithPast:
        """Logits [B, L or kept, V]; or, with labels [B, L], the mean loss per supervised token and no logits.

        `num_items_in_batch` is the number of supervised tokens of the whole global batch, over which the mean is taken.
        """
        if labels is not None:
            kwargs.setdefault("use_cache", False)
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        outputs = self.model(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        hidden = outputs.last_hidden_state  # [B, L, D]
        loss = logits = None
        if labels is not None:
            loss = self.supervised_loss(hidden, labels, num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.head(hidden[:, kept])
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def supervised_loss(self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        """Cross entropy of the next token over supervised positions: [B, L, D], [B, L] -> scalar, in fp32.

        The head never sees the other positions (98 % of them in pretraining), and at most LOSS_CHUNK rows of logits
        exist at once.
        """
        targets = labels[:, 1:]
        chosen = targets != IGNORE
        hidden, targets = hidden[:, :-1][chosen], targets[chosen]  # [S, D], [S]
        if targets.numel() == 0:
            return hidden.sum() * 0.0

        def summed(rows: Tensor, wanted: Tensor) -> Tensor:
            return F.cross_entropy(self.head(rows).float(), wanted, reduction="sum")

        chunks = list(zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True))
        if len(chunks) == 1:
            total = summed(*chunks[0])
        else:
            total = torch.stack([checkpoint(summed, *chunk, use_reentrant=False) for chunk in chunks]).sum()
        return total / (targets.numel() if num_items is None else num_items)


for _kind in (Factory("llms"), Factory("vision_towers")):  # what transformers lacks registers itself on import
    for _name in _kind.names():
        _kind.get(_name)
AutoConfig.register(TinyLlavaConfig.model_type, TinyLlavaConfig)
AutoModelForImageTextToText.register(TinyLlavaConfig, TinyLlavaForConditionalGeneration)
# Checkpoints carry the published llava names (`language_model.model.*`, `vision_tower.vision_model.*`) in both classes.
register_checkpoint_conversion_mapping(TinyLlavaConfig.model_type, get_checkpoint_conversion_mapping("llava"))
register_checkpoint_conversion_mapping("TinyLlavaModel", get_checkpoint_conversion_mapping("LlavaModel"))
