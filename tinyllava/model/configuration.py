"""The config of every model in memory: Llava's fields and our own."""

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, PreTrainedConfig

from tinyllava.factory import Factory, check_trusted
from tinyllava.vision_towers import import_tower


@strict
class TinyLlavaConfig(LlavaConfig):
    """Llava's config, with fields for what Llava's does not describe."""

    # The original's checkpoints say "tinyllava". checkpoint/legacy.py reads them by key mapping, not this class.
    model_type = "tiny_llava"

    connector: dict | None = None  # {name: options}
    prefix_tokens: int = 1  # CLS and registers before the tower's patches; dropped when the strategy is "default"
    head_bias: bool = False
    head_scale: float = 1.0
    head_softcap: float | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    # Pixels a side after preprocessing. With interpolated positions, this may differ from the tower's own config.
    image_size: int = 336

    # Ids of tokens that the LLM did not have before the model was built: the rows that the tuning `embeddings` trains.
    new_tokens: list[int] | None = None

    tiles: int | None = None  # at most so many tiles beside the thumbnail (data/tiles.py); None: an image is one view
    image_processor: str | None = None  # the user's own class, my_pkg.my_module:Name; None: Llava's class
    families: dict | None = None  # {vision_towers or llms: my_pkg.my_module:Name} if transformers does not have it

    # What the original TinyLLaVA Factory did, for its checkpoints (checkpoint/legacy.py):
    drop_first_patch: bool = False  # it dropped the first patch of a tower without CLS: 728 of SigLIP's 729 are left
    image_scale: float = 1.0  # its Gemma scaled all input embeddings, image tokens too, by the root of its width
    head_rows: int | None = None  # rows of its head before <image> got a new one: no answer contains a later id

    def __post_init__(self, **kwargs: object) -> None:
        # First: importing a family registers its config classes, which Llava's config then looks up.
        for kind, address in (self.families or {}).items():
            check_trusted(address, Factory(kind).kind.singular)
            Factory(kind).get(address)
        import_tower(get_model_type(self.vision_config))
        Factory("llms").import_file(get_model_type(self.text_config))
        super().__post_init__(**kwargs)

    @staticmethod
    def list_own_fields() -> tuple[str, ...]:
        """Names of the fields that Llava's config does not have."""
        return tuple(TinyLlavaConfig.__annotations__)

    @property
    def num_patches(self) -> int:
        """The number of features that the connector gets for one view of an image."""
        patches = (self.image_size // self.vision_config.patch_size) ** 2
        return patches + self.prefix_tokens - self.dropped_tokens

    @property
    def dropped_tokens(self) -> int:
        """The number of the tower's leading tokens that the connector does not get."""
        return self.prefix_tokens + self.drop_first_patch if self.vision_feature_select_strategy == "default" else 0


def get_model_type(config: PreTrainedConfig | dict | None) -> str | None:
    """The `model_type` of a config, or of its fields before transformers makes a config of them."""
    return config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
