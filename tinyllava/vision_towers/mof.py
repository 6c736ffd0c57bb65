"""`mof`: a mixture of two towers that see the same image.

Their patch features are joined on channels, so that any connector sees both, as in prismatic's fused towers (arXiv
2402.07865, section 4.2). With the connector `mof_mlp` their tokens are interleaved (arXiv 2401.06209, section 4.2).

    vision_tower: mof:openai/clip-vit-large-patch14+facebook/dinov2-large         # two Hub ids or directories
    vision_tower: {config: {model_type: mof, first: {...}, second: {...}}}        # random weights

The image processor is that of the first tower. The second tower gets the same image, normalised with its own
statistics. If the two rows of `image_mean` and `image_std` are equal, it gets the first tower's pixels, as in the
original TinyLLaVA Factory.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from tinyllava.errors import UserError
from tinyllava.vision_towers import CompositeTower, MemberInput, find_family, import_tower, make_size_options

# The two towers of a mixture, and the default model_type of each.
DEFAULTS = {"first": "clip_vision_model", "second": "dinov2"}


class VisionTower:
    """What transformers cannot know about a mixture."""

    @staticmethod
    def prefix_tokens(config: PreTrainedConfig) -> int:
        """Zero: each tower's prefix tokens are dropped before the patches are joined."""
        return 0

    @staticmethod
    def image_processor(config: PreTrainedConfig) -> dict:
        """The image processor of the first tower."""
        return find_family(config.first).image_processor(config.first)

    @staticmethod
    def split_name(name: str) -> list[str]:
        """`mof:A+B` -> [A, B]. Raises UserError unless there are two names."""
        names = name.partition(":")[2].split("+")
        if len(names) != len(DEFAULTS) or not all(names):
            raise UserError(f"vision tower '{name}': a mixture has two towers. Write mof:FIRST+SECOND.")
        return names

    @staticmethod
    def join_configs(members: list[Any]) -> dict[str, Any]:
        """The fields of MofConfig."""
        return {"model_type": MofConfig.model_type, **dict(zip(DEFAULTS, members, strict=True))}


@strict
class MofConfig(PreTrainedConfig):
    """The configs of two towers, and the statistics that normalise the pixels of each (one row for each tower)."""

    model_type = "mof"
    sub_configs = dict.fromkeys(DEFAULTS, AutoConfig)  # transformers' own name for it

    first: dict | PreTrainedConfig | None = None
    second: dict | PreTrainedConfig | None = None
    image_mean: list[list[float]] | None = None
    image_std: list[list[float]] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        for name, default in DEFAULTS.items():
            fields = getattr(self, name)
            if not isinstance(fields, PreTrainedConfig):
                fields = {"model_type": default, **(fields or {})}
                import_tower(fields["model_type"])
                setattr(self, name, AutoConfig.for_model(**fields))
        for name in ("image_mean", "image_std"):
            if getattr(self, name) is None:
                towers = (self.first, self.second)
                setattr(self, name, [list(find_family(tower).image_processor(tower)[name]) for tower in towers])
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """The channels of both towers together."""
        return self.first.hidden_size + self.second.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """The depth of the shallower tower, because layers are counted from the last."""
        return min(self.first.num_hidden_layers, self.second.num_hidden_layers)

    @property
    def image_size(self) -> int:
        """The image size of the first tower."""
        return self.first.image_size

    @property
    def patch_size(self) -> int:
        """The patch size of the first tower."""
        return self.first.patch_size


class Mof(CompositeTower):
    """Two towers, [I, 3, H, W] -> [I, P, D1 + D2]. Pixels come as the first tower's image processor makes them."""

    config_class = MofConfig
    main_input_name = "pixel_values"
    member_names: ClassVar = tuple(DEFAULTS)
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: MofConfig):
        super().__init__(config)
        self.first, self.second = AutoModel.from_config(config.first), AutoModel.from_config(config.second)
        # Computed once: every forward needs it, and finding a family lists a directory.
        self.prefix_tokens = [find_family(tower).prefix_tokens(tower) for tower in (config.first, config.second)]
        self.post_init()

    def split_inputs(self, pixel_values: Tensor, indices: list[int]) -> list[MemberInput]:
        """The input of each tower: its own pixels, and indices of hidden states that are aligned at the last layer."""
        pixels = (pixel_values, self._convert_for_second(pixel_values))
        inputs = []
        for tower, member_pixels, prefix in zip(self.members.values(), pixels, self.prefix_tokens, strict=True):
            deeper = tower.config.num_hidden_layers - self.config.num_hidden_layers
            inputs.append(MemberInput(tower, member_pixels, [index + deeper for index in indices], prefix))
        return inputs

    def _convert_for_second(self, pixels: Tensor) -> Tensor:
        """The pixels for the second tower: with its statistics, and at the size that gives it as many patches."""
        side = pixels.shape[-1] // self.first.config.patch_size * self.second.config.patch_size
        means, stds = self.config.image_mean, self.config.image_std
        converted = pixels
        if means[0] != means[1] or stds[0] != stds[1]:
            mean = torch.tensor(means, device=pixels.device).view(2, 1, 3, 1, 1)
            std = torch.tensor(stds, device=pixels.device).view(2, 1, 3, 1, 1)
            # Undo the first tower's normalisation, then apply the second's.
            converted = (pixels.float() * std[0] + mean[0] - mean[1]) / std[1]
        if side != pixels.shape[-1]:
            converted = F.interpolate(converted.float(), size=(side, side), mode="bicubic", antialias=True)
        return converted.to(pixels.dtype)

    def forward(self, pixel_values: Tensor, **kwargs: object) -> BaseModelOutput:
        """Hidden states of both towers, joined: `hidden_states[-k]` holds the k-th from the last of each."""
        columns = []
        for member in self.split_inputs(pixel_values, list(range(self.config.num_hidden_layers + 1))):
            options = make_size_options(member.tower.config, member.pixel_values)
            states = member.tower(member.pixel_values, output_hidden_states=True, **options).hidden_states
            columns.append([states[index][:, member.prefix_tokens :] for index in member.indices])
        joined = tuple(torch.cat(pair, dim=-1) for pair in zip(*columns, strict=True))
        return BaseModelOutput(last_hidden_state=joined[-1], hidden_states=joined)


AutoConfig.register(MofConfig.model_type, MofConfig, exist_ok=True)
AutoModel.register(MofConfig, Mof, exist_ok=True)
