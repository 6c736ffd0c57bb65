"""The config of every model in memory: Llava's, and what Llava has no place for."""

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

from tinyllava.factory import Factory, check_trusted


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

    # Token ids whose embeddings the LLM did not have before the model was built: what the tuning `embeddings` trains.
    new_tokens: list[int] | None = None

    tiles: int | None = None  # the most tiles of a picture beside its thumbnail (data/tiles.py); None: it is one view
    image_processor: str | None = None  # the user's own as my_pkg.my_module:Name; None: Llava's, with other fields
    families: dict | None = None  # {vision_towers or llms: my_pkg.my_module:Name}, whose classes transformers lacks

    # What the original TinyLLaVA Factory did, for its checkpoints (legacy.py):
    drop_first_patch: bool = False  # it took the first patch of a tower without CLS for one: 728 of SigLIP's 729
    image_scale: float = 1.0  # Gemma scaled all that came into it, image tokens too: by the root of its width
    head_rows: int | None = None  # rows of its head, when <image> got one of its own beyond them: no part of any answer

    def __post_init__(self, **kwargs: object) -> None:
        for kind, address in (self.families or {}).items():  # which make their config classes known when imported
            check_trusted(address, Factory(kind).kind.singular)
            Factory(kind).get(address)
        super().__post_init__(**kwargs)

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
