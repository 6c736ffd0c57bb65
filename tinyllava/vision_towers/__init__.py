"""Vision towers turn images into patch features. One file is one family of transformers vision models.

Read siglip.py first, then clip.py.

The file is named by the tower's `config.model_type`, without `_vision_model`: siglip.py. The tower itself loads through
transformers' `AutoModel`. Its file adds what transformers does not know:

    class VisionTower:
        @staticmethod
        def prefix_tokens(config: PreTrainedConfig) -> int: ...  # CLS and register tokens before the patches
        @staticmethod
        def image_processor(config: PreTrainedConfig) -> dict: ...  # fields of LlavaImageProcessor, as in its own

A recipe can name a family outside the package, as `family: my_pkg.my_module:VisionTower`
(docs/add-your-own-vision-tower.md). A family whose model transformers does not have also defines its config and its
model, and registers both with the Auto classes. Its file is imported when a config of its `model_type` is read.

A family that combines other towers (mof.py) has two more methods:

    class VisionTower:
        @staticmethod
        def split_name(name: str) -> list[str]: ...  # names of the members in `FAMILY:A+B`
        @staticmethod
        def join_configs(members: list) -> dict: ...  # fields of its config, `model_type` included, from its members'

and its model inherits from `CompositeTower`. A member can be a tower of the package, or one that the
user registered.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tinyllava.errors import UserError
from tinyllava.factory import Factory


@dataclass(frozen=True)
class MemberInput:
    """The input of one member of a `CompositeTower`."""

    tower: PreTrainedModel
    pixel_values: Tensor  # [I, 3, H, W], at the member's own size and normalised with its own statistics
    indices: list[int]  # which of its hidden states are needed
    prefix_tokens: int  # how many leading tokens the composite tower drops before it joins the members' patches


class CompositeTower(PreTrainedModel):
    """A tower that combines other towers, its members. They are submodules under the names of `member_names`.

    The config holds each member's config under the same name.
    """

    member_names: ClassVar[tuple[str, ...]] = ()

    @property
    def members(self) -> dict[str, PreTrainedModel]:
        """The towers by name."""
        return {name: getattr(self, name) for name in self.member_names}

    def load_members(self, names: list[str], load: Callable[[str, PreTrainedConfig], PreTrainedModel]) -> None:
        """Replace each member by what `load(name, config)` returns. `names` are those of `split_name`."""
        for member, name in zip(self.member_names, names, strict=True):
            setattr(self, member, load(name, getattr(self.config, member)))

    def split_inputs(self, pixel_values: Tensor, indices: list[int]) -> list[MemberInput]:
        """The input of each member: its pixels, and the indices of its hidden states. pixel_values: [I, 3, H, W]."""
        raise NotImplementedError


def get_family_name(model_type: str) -> str:
    """The name of the file that knows a tower: `siglip` for `siglip_vision_model`, `dinov3_vit` for itself.

    Raises UserError for NaFlex SigLIP2: it keeps the aspect ratio of an image, so it has no fixed grid of patches.
    """
    name = _strip_suffix(model_type)
    if name == "siglip2":
        raise UserError(
            "vision tower siglip2: NaFlex SigLIP2 gives no fixed number of patches. Use a fixed-resolution one, such as"
            " google/siglip2-base-patch16-256 or google/siglip2-so400m-patch14-384."
        )
    return name


def _strip_suffix(model_type: str) -> str:
    return model_type.removesuffix("_vision_model").removesuffix("_vision")


def find_family(config: PreTrainedConfig) -> Any:
    """The `VisionTower` class of a tower's family, by `config.model_type`. Raises UserError for an unknown family."""
    towers = Factory("vision_towers")
    name, known = get_family_name(config.model_type), towers.list_names()
    if name not in known:
        raise UserError(
            f"unknown vision tower family '{name}'. Known: {', '.join(known)}."
            " To add one, write a file of a few lines: docs/add-your-own-vision-tower.md."
        )
    return towers.get(name)


def import_tower(model_type: str | None) -> None:
    """Import the package's file for a `model_type`, if there is one, as `Factory.import_file` does for an LLM's."""
    Factory("vision_towers").import_file(_strip_suffix(model_type or ""))


def split_tower_name(name: str) -> list[str]:
    """The names of the towers that `name` stands for: the members of a composite (`FAMILY:A+B`), else `name` alone."""
    family = _find_composite(name)
    return family.split_name(name) if family else [name]


def join_tower_configs(name: str, members: list[Any]) -> Any:
    """The config of the tower `name`, from the configs of its members (`split_tower_name(name)`).

    members: transformers configs, or dicts of their fields. A composite tower's config is returned as a dict of fields.
    Any other tower has one member, and its config is returned unchanged.
    """
    family = _find_composite(name)
    return family.join_configs(members) if family else members[0]


def _find_composite(name: str) -> Any:
    """The family of `FAMILY:A+B`, or None for any other name."""
    prefix, colon, _ = name.partition(":")
    towers = Factory("vision_towers")
    family = towers.get(prefix) if colon and prefix in towers.list_names() else None
    return family if hasattr(family, "split_name") else None


def make_size_options(config: PreTrainedConfig, pixel_values: Tensor) -> dict[str, bool]:
    """Extra arguments of a tower's forward, for images whose size differs from the tower's own.

    CLIP and SigLIP interpolate their position embeddings only on demand. DINOv2 always does, DINOv3 has none.
    """
    on_demand = config.model_type in {"clip_vision_model", "siglip_vision_model"}
    return {"interpolate_pos_encoding": True} if on_demand and pixel_values.shape[-1] != config.image_size else {}
