"""`mof`: a mixture of two towers that look at the same picture.

Their patches stand side by side on channels, so that any connector sees both, as in prismatic's fused towers (arXiv
2402.07865, section 4.2); with the connector `mof_mlp` their tokens are interleaved (arXiv 2401.06209, section 4.2).

    vision_tower: mof:openai/clip-vit-large-patch14+facebook/dinov2-large         # two Hub ids or directories
    vision_tower: {config: {model_type: mof, first: {...}, second: {...}}}        # random weights

The image processor is the first tower's. The second gets the same picture normalised its own way; with equal rows in
`image_mean` and `image_std` it gets the first's pixels, as in the original TinyLLaVA Factory.
"""

from importlib import import_module

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from tinyllava.errors import UserError
from tinyllava.vision_towers import family_name, size_options

DEFAULTS = {"first": "clip_vision_model", "second": "dinov2"}


class VisionTower:
    """What loading a mixture needs to know."""

    @staticmethod
    def prefix_tokens(config: PreTrainedConfig) -> int:
        """None: each tower's own are dropped before the two are joined."""
        return 0

    @staticmethod
    def image_processor(config: PreTrainedConfig) -> dict:
        """The first tower's."""
        return family(config.first).image_processor(config.first)


def family(config: PreTrainedConfig) -> type[VisionTower]:
    """What the package knows about one of the two towers. Raises UserError for one that it does not know."""
    name = family_name(config)
    try:
        return import_module(f"tinyllava.vision_towers.{name}").VisionTower
    except ModuleNotFoundError:
        raise UserError(
            f"mof cannot mix in a {config.model_type}: there is no file vision_towers/{name}.py that knows it."
        ) from None


@strict
class MofConfig(PreTrainedConfig):
    """The configs of two towers, and the statistics that each one's pixels are normalised with (a row a tower)."""

    model_type = "mof"
    sub_configs = dict.fromkeys(DEFAULTS, AutoConfig)  # transformers' own name for it

    first: dict | PreTrainedConfig | None = None
    second: dict | PreTrainedConfig | None = None
    image_mean: list[list[float]] | None = None
    image_std: list[list[float]] | None = None

    def __post_init__(self, **kwargs):
        for name, default in DEFAULTS.items():
            own = getattr(self, name)
            if not isinstance(own, PreTrainedConfig):
                setattr(self, name, AutoConfig.for_model(**{"model_type": default, **(own or {})}))
        for name in ("image_mean", "image_std"):
            if getattr(self, name) is None:
                rows = [family(tower).image_processor(tower)[name] for tower in (self.first, self.second)]
                setattr(self, name, [list(row) for row in rows])
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Channels of both towers."""
        return self.first.hidden_size + self.second.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers are counted from the last, so a mixture is as deep as the shallower tower."""
        return min(self.first.num_hidden_layers, self.second.num_hidden_layers)

    @property
    def image_size(self) -> int:
        """The first tower's."""
        return self.first.image_size

    @property
    def patch_size(self) -> int:
        """The first tower's."""
        return self.first.patch_size


class Mof(PreTrainedModel):
    """Two towers, [I, 3, H, W] -> [I, P, D1 + D2]. Pixels come as the first tower's image processor makes them."""

    config_class = MofConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: MofConfig):
        super().__init__(config)
        self.first, self.second = AutoModel.from_config(config.first), AutoModel.from_config(config.second)
        self.post_init()

    def members(self, pixel_values: Tensor, indices: list[int]) -> list[tuple[PreTrainedModel, Tensor, list[int], int]]:
        """Each tower with its own pixels, the indices of its hidden states, and the number of its prefix tokens."""
        towers, depth = (self.first, self.second), self.config.num_hidden_layers
        pixels = (pixel_values, self._for_second(pixel_values))
        return [
            (
                tower,
                own,
                [index + tower.config.num_hidden_layers - depth for index in indices],
                family(tower.config).prefix_tokens(tower.config),
            )
            for tower, own in zip(towers, pixels, strict=True)
        ]

    def _for_second(self, pixels: Tensor) -> Tensor:
        """The picture at the size that gives as many patches, normalised with the second tower's statistics."""
        side = pixels.shape[-1] // self.first.config.patch_size * self.second.config.patch_size
        (mean, own_mean), (std, own_std) = self.config.image_mean, self.config.image_std
        own = pixels
        if (mean, std) != (own_mean, own_std):
            mean, own_mean, std, own_std = (
                torch.tensor(row, device=pixels.device).view(1, 3, 1, 1) for row in (mean, own_mean, std, own_std)
            )
            own = (own.float() * std + mean - own_mean) / own_std
        if side != pixels.shape[-1]:
            own = F.interpolate(own.float(), size=(side, side), mode="bicubic", antialias=True)
        return own.to(pixels.dtype)

    def forward(self, pixel_values: Tensor, **kwargs: object) -> BaseModelOutput:
        """Hidden states of both towers, joined: `hidden_states[-k]` holds the k-th from the last of each."""
        columns = []
        for tower, pixels, indices, prefix in self.members(
            pixel_values, list(range(self.config.num_hidden_layers + 1))
        ):
            states = tower(pixels, output_hidden_states=True, **size_options(tower.config, pixels)).hidden_states
            columns.append([states[index][:, prefix:] for index in indices])
        joined = tuple(torch.cat(pair, dim=-1) for pair in zip(*columns, strict=True))
        return BaseModelOutput(last_hidden_state=joined[-1], hidden_states=joined)


AutoConfig.register(MofConfig.model_type, MofConfig, exist_ok=True)
AutoModel.register(MofConfig, Mof, exist_ok=True)
