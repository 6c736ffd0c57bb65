"""The model: transformers' Llava, and what it does not have.

In memory every model is this class. It adds: any connector; an LLM head with a bias, a scale or a soft cap (Phi-2,
Granite, Gemma2); head and loss on supervised positions only; a frozen vision tower that runs without autograd and stops
at the layer that is used; pixels that arrive as uint8. On disk a checkpoint is plain `llava` wherever that is exact
(checkpoint/layout.py).

Shapes: B batch, L positions, I images, N tower tokens, P patches, T image tokens, Dv tower width, D LLM width, V
vocabulary.
"""

import copy
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava import modeling_llava as llava

from tinyllava.data.labels import IGNORE
from tinyllava.data.tiles import Grid, count_views, order_tokens
from tinyllava.errors import UserError
from tinyllava.factory import Factory, check_trusted
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.modules import is_sharded
from tinyllava.model.tower import compute_states

# Supervised positions whose logits exist at the same time: 4096 x 256k x 4 bytes = 4 GB for Gemma's vocabulary.
LOSS_CHUNK = 4096


def make_connector(config: TinyLlavaConfig) -> nn.Module:
    """The connector of a config.

    With tiles it also holds the token that ends a row of tiles, so that this is trained, frozen and saved with it.
    """
    layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    ((name, options),) = config.connector.items()
    # The user's own code: a recipe has imported it already, and a checkpoint may run it only with the user's consent.
    if ":" in name and name not in Factory("connectors").registered:
        check_trusted(name, "connector")
    connector, options = Factory("connectors").resolve(name, options)
    if not (isinstance(connector, type) and issubclass(connector, nn.Module)):
        raise UserError(
            f"connector {name} is {connector!r}, expected a subclass of torch.nn.Module. Name my_pkg.my_module:Class."
        )
    module = connector(config.vision_config.hidden_size * layers, config.text_config.hidden_size, **options)
    if config.tiles:
        module.row_separator = nn.Embedding(1, config.text_config.hidden_size)
    return module


class TinyLlavaModel(llava.LlavaModel):
    """Vision tower, connector (under Llava's name, multi_modal_projector) and language model without its head."""

    config: TinyLlavaConfig

    def __init__(self, config: TinyLlavaConfig) -> None:
        llava.LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = make_connector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def find_used_tower_parameters(self) -> set[str]:
        """The tower's parameters that its features depend on: no layer above the feature layer, no head, no mask token.

        A backward pass through a copy on the meta device finds them, so it works for any tower.
        """
        with torch.device("meta"):
            copy_ = AutoModel.from_config(copy.deepcopy(self.config.vision_config))
            pixels = torch.zeros(1, 3, self.config.image_size, self.config.image_size)
        states = compute_states(copy_, pixels, self._get_layer_indices(), whole=True)
        sum(state.sum() for state in states).backward()
        return {name for name, parameter in copy_.named_parameters() if parameter.grad is not None}

    def _get_layer_indices(self) -> list[int]:
        """Indices into the tower's hidden states (0: embeddings, k: output of layer k), counted from the front."""
        layers = self.config.vision_feature_layer
        count = self.config.vision_config.num_hidden_layers + 1
        return [index % count for index in ([layers] if isinstance(layers, int) else layers)]

    def compute_tower_features(self, pixel_values: Tensor) -> Tensor:
        """Features of the chosen layer(s) without prefix tokens: [I, 3, H, W] -> [I, P, Dv * layers]."""
        parameter = next(self.vision_tower.parameters())
        if pixel_values.dtype == torch.uint8:  # normalised here, on the device, instead of in the data workers
            mean = torch.tensor(self.config.image_mean, device=pixel_values.device).view(1, 3, 1, 1)
            std = torch.tensor(self.config.image_std, device=pixel_values.device).view(1, 3, 1, 1)
            pixel_values = (pixel_values.float() / 255 - mean) / std
        pixel_values = pixel_values.to(parameter.dtype)
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.vision_tower.parameters())
        with nullcontext() if trained else torch.no_grad():
            states = compute_states(self.vision_tower, pixel_values, self._get_layer_indices(), whole=trained)
        return torch.cat([state[:, self.config.dropped_tokens :] for state in states], dim=-1)

    def project_features(self, features: Tensor) -> Tensor:
        """Image tokens of tower features: [I, P, Dv] -> [I, T, D]. A frozen tower can have another precision."""
        floats = (weight.dtype for weight in self.multi_modal_projector.parameters() if weight.is_floating_point())
        return self.multi_modal_projector(features.to(next(floats, features.dtype)))

    def get_image_features(
        self, pixel_values: Tensor, image_grids: Tensor | None = None, **kwargs: object
    ) -> BaseModelOutputWithPooling:
        """Image tokens in the LLM's space as `pooler_output`: a tuple of I tensors [T, D].

        With tiles, `pixel_values` are the views of all images [W, 3, H, W], and `image_grids` [I, 2] their rows and
        columns. T then differs between images. Raises ValueError when the two do not agree.
        """
        tokens = self.project_features(self.compute_tower_features(pixel_values))
        if self.config.image_scale != 1.0:
            tokens = tokens * self.config.image_scale
        if image_grids is not None:
            tokens = self.arrange_tiles(tokens, image_grids.tolist())
        return BaseModelOutputWithPooling(pooler_output=tuple(tokens))

    def arrange_tiles(self, tokens: Tensor, grids: list[Grid]) -> tuple[Tensor, ...]:
        """Tokens of all views [W, T, D] -> tokens of each image [.., D], with a separator after every row of tiles."""
        expected = sum(map(count_views, grids))
        if len(tokens) != expected:
            raise ValueError(f"{len(tokens)} views in pixel_values, but the {len(grids)} grids need {expected}")
        first = torch.zeros(1, dtype=torch.long, device=tokens.device)
        # Always in the autograd graph, also for a batch without tiles: every rank must have its gradient.
        separator = self.multi_modal_projector.row_separator(first)
        orders = order_tokens(tokens.shape[1], grids)
        order = torch.from_numpy(np.concatenate(orders)).to(tokens.device)
        return torch.cat([tokens.flatten(0, 1), separator.to(tokens.dtype)])[order].split(list(map(len, orders)))

    def train(self, mode: bool = True) -> "TinyLlavaModel":
        """Set the mode, but keep a frozen tower, connector or BatchNorm in eval mode.

        DINOv3 rescales its positions at random in training. A BatchNorm under an adapter would change its statistics,
        and a checkpoint has those of the base weights.
        """
        super().train(mode)
        norms = [each for each in self.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.affine]
        for module in (self.vision_tower, self.multi_modal_projector, *norms):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self

    def make_idle_features(self) -> Tensor:
        """A zero that depends on every trained parameter of tower and connector.

        A batch without images must still give them a gradient of zero: DDP, ZeRO-3 and FSDP wait for it on all ranks,
        and AdamW's momentum must move them at every step. A frozen tower is run only if it is sharded.
        """
        trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        like = next(self.language_model.parameters())
        if trained or is_sharded(self.vision_tower):
            size = self.config.image_size
            features = self.compute_tower_features(torch.zeros(1, 3, size, size, device=like.device, dtype=like.dtype))
        else:
            width = self.config.vision_config.hidden_size * len(self._get_layer_indices())
            features = torch.zeros(1, self.config.num_patches, width, device=like.device, dtype=like.dtype)
        tokens = self.project_features(features)
        if self.config.tiles:
            tokens = torch.cat(self.arrange_tiles(tokens, [(1, 1)] * len(tokens)))
        return 0.0 * tokens.sum()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_grids: Tensor | None = None,
        **kwargs: object,
    ) -> llava.LlavaModelOutputWithPast:
        """Llava's forward. A training batch without images keeps tower and connector in the autograd graph."""
        training = self.training and torch.is_grad_enabled()
        if pixel_values is None and input_ids is not None and (training or is_sharded(self)):
            # Sharded weights require the same order as with images: Llava embeds first, except with tiles.
            idle = self.make_idle_features() if self.config.tiles else None
            inputs_embeds = self.get_input_embeddings()(input_ids)
            idle = self.make_idle_features() if idle is None else idle
            inputs_embeds, input_ids = inputs_embeds + idle.to(inputs_embeds.dtype), None
        if pixel_values is not None and image_grids is not None:
            features = self.get_image_features(pixel_values, image_grids)
            self.check_placeholders(input_ids, features.pooler_output)
            kwargs["mm_encoder_outputs"], pixel_values = {"image": features}, None
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs)

    def check_placeholders(self, input_ids: Tensor, features: tuple[Tensor, ...]) -> None:
        """Raise ValueError unless the ids have as many placeholders as the images have tokens."""
        placeholders, tokens = int((input_ids == self.config.image_token_id).sum()), sum(map(len, features))
        if placeholders != tokens:
            raise ValueError(
                f"{placeholders} image placeholders in input_ids, but {len(features)} images have {tokens} tokens."
                " Make both with the same processor."
            )


class TinyLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """The whole model. With `labels`, it computes only the loss, on supervised positions."""

    config: TinyLlavaConfig

    def __init__(self, config: TinyLlavaConfig) -> None:
        llava.LlavaPreTrainedModel.__init__(self, config)
        self.model = TinyLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=config.head_bias)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{self.get_embeddings_name()}.weight"}
        self.post_init()

    def get_embeddings_name(self) -> str:
        """The name of the LLM's input embeddings: `embed_tokens` in most, `wte` in GPT-2."""
        embeddings = self.model.language_model.get_input_embeddings()
        return next(name for name, module in self.model.language_model.named_modules() if module is embeddings)

    def compute_logits(self, hidden: Tensor) -> Tensor:
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
        position_ids: Tensor | None = None,  # named, so that `generate` makes them: learned positions skip padding
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        image_grids: Tensor | None = None,
        label_smoothing: float = 0.0,
        mm_encoder_outputs: dict | None = None,  # named, so that `generate` encodes images once, and beams repeat them
        **kwargs: object,
    ) -> llava.LlavaCausalLMOutputWithPast:
        """Logits [B, L or kept, V]; or, with labels [B, L], the mean loss per supervised token and no logits.

        num_items_in_batch: supervised tokens of the whole global batch, over which the mean is taken. label_smoothing:
        the share of each target that is spread evenly over the vocabulary.
        """
        if labels is not None:
            kwargs.setdefault("use_cache", False)
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        kwargs |= {"image_grids": image_grids, "mm_encoder_outputs": mm_encoder_outputs}
        outputs = self.model(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        others = dict(outputs)  # what it shares with the outputs of the whole model: cache, hidden states, ...
        hidden = others.pop("last_hidden_state")  # [B, L, D]
        loss = logits = None
        if labels is not None:
            loss = self.compute_supervised_loss(hidden, labels, num_items_in_batch, label_smoothing)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.compute_logits(hidden[:, kept])
        return llava.LlavaCausalLMOutputWithPast(loss=loss, logits=logits, **others)

    def compute_supervised_loss(
        self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None = None, smoothing: float = 0.0
    ) -> Tensor:
        """Cross entropy of the next token over supervised positions: [B, L, D], [B, L] -> scalar, in fp32.

        The head skips the other positions (98 % of them in pretraining), and at most LOSS_CHUNK rows of logits exist
        at once.
        """
        targets = labels[:, 1:]
        supervised = targets != IGNORE
        hidden, targets = hidden[:, :-1][supervised], targets[supervised]  # [S, D], [S]
        # Every call of a sharded head gathers it on all ranks. All must call it equally often, so each calls it once.
        size = max(1, len(targets)) if is_sharded(self.lm_head) else LOSS_CHUNK

        def sum_loss(rows: Tensor, labels: Tensor) -> Tensor:
            # Rows beyond head_rows have probability 0: smoothing over them would be infinite.
            logits = self.compute_logits(rows)[:, : self.config.head_rows].float()
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)

        chunks = list(zip(hidden.split(size), targets.split(size), strict=True))
        if len(chunks) == 1:
            total = sum_loss(*chunks[0])
        else:
            total = torch.stack([checkpoint(sum_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()
        return total / (max(1, targets.numel()) if num_items is None else num_items)


AutoConfig.register(TinyLlavaConfig.model_type, TinyLlavaConfig)
AutoModelForImageTextToText.register(TinyLlavaConfig, TinyLlavaForConditionalGeneration)
# Checkpoints use the published llava names (`language_model.model.*`, `vision_tower.vision_model.*`) in both classes.
register_checkpoint_conversion_mapping(TinyLlavaConfig.model_type, get_checkpoint_conversion_mapping("llava"))
register_checkpoint_conversion_mapping("TinyLlavaModel", get_checkpoint_conversion_mapping("LlavaModel"))
