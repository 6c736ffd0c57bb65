"""What `load` finds in directories that transformers wrote, and is asked in the words of its `from_pretrained`.

Such a directory can miss files that ours never miss, its config says less than ours, and the keywords have other names.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import BitsAndBytesConfig, LlavaConfig, LlavaProcessor

from tinyllava.checkpoint.legacy import KEYWORDS
from tinyllava.data.template import BoundTemplate, Template
from tinyllava.errors import UserError
from tinyllava.factory import TRUST, suggest_known
from tinyllava.files import FAULTS, raise_value_errors, shorten_error
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.vision_towers import find_family

PROCESSOR_FILES = {
    "image processor": ("processor_config.json", "preprocessor_config.json"),
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
}
QUANTISATION = ("load_in_4bit", "load_in_8bit", "quantization_config")
KNOWN = ("dtype", "attn_implementation", *QUANTISATION, *KEYWORDS)
INSTEAD = {
    "torch_dtype": "give dtype='bfloat16', 'float16', 'float32' or 'auto'",
    "device_map": "give `tinyllava.load` a device, such as device='cuda:0'; a model is not split over devices",
    "use_flash_attention_2": "give attn_implementation='flash_attention_2'",
    "trust_remote_code": f"import your own code before you load, or name its module in ${TRUST}",
    "revision": "download it with `hf download --revision` and give the directory",
    "token": "set HF_TOKEN",
    "cache_dir": "set HF_HOME",
    "local_files_only": "set HF_HUB_OFFLINE=1",
}


class ServedTemplate(Template):
    """The chat template of another project's checkpoint. Prompts use it as it is. Training requires exact labels.

    Those of llava-hf are not exact: the prompt ends before the space with which the answer begins.
    """

    def bind(self, tokenizer: Any, tested: bool = False) -> BoundTemplate:
        return super().bind(tokenizer, tested)

    def bind_to_train(self, tokenizer: Any) -> BoundTemplate:
        self.bind(tokenizer, tested=True)  # raises UserError if labels would not be exact
        return self.bind(tokenizer)


def check_keywords(names: Iterable[str]) -> None:
    """Raise UserError for keywords that `load` does not know. For those of transformers, it says what to do instead."""
    for name in names:
        if name in INSTEAD:
            raise UserError(f"{name} is no keyword of `load`: {INSTEAD[name]}.")
        if name not in KNOWN:
            raise UserError(f"unknown keyword '{name}'{suggest_known(name, KNOWN)}")


def read_quantisation(keywords: dict[str, Any]) -> BitsAndBytesConfig | None:
    """Take `load_in_4bit`, `load_in_8bit` or `quantization_config` out of `keywords`. Raises UserError for others."""
    taken = {name: keywords.pop(name) for name in QUANTISATION if name in keywords}
    config = taken.pop("quantization_config", None)
    if not config and not any(taken.values()):
        return None
    if {*map(type, taken.values())} - {bool} or (config is not None) + sum(taken.values()) > 1:
        raise UserError("give one of load_in_4bit=True, load_in_8bit=True and quantization_config=.")
    if config is None:
        config = BitsAndBytesConfig(**taken, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        config.bnb_4bit_compute_dtype = None  # the model's own
    if not isinstance(config, BitsAndBytesConfig) or not (config.load_in_4bit or config.load_in_8bit):
        raise UserError(
            f"quantization_config is a {type(config).__name__} without load_in_4bit or load_in_8bit, expected"
            " transformers' BitsAndBytesConfig with one of them."
        )
    return config


def read_processor(directory: Path) -> LlavaProcessor:
    """The image processor and the tokenizer in a directory. Raises UserError when one is missing or damaged."""
    for kind, names in PROCESSOR_FILES.items():
        if not any((directory / name).exists() for name in names):
            raise UserError(
                f"{directory} has no {kind}: none of {', '.join(names)}. Copy it from where the model was published."
            )
    try:
        with raise_value_errors():
            return LlavaProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)
    except FAULTS as error:
        reason = shorten_error(error)
        raise UserError(
            f"cannot read the image processor and the tokenizer in {directory}: {reason}. Copy them again."
        ) from None


def complete_config(config: LlavaConfig, images: Any, record: Mapping[str, Any]) -> TinyLlavaConfig:
    """Our config of a plain llava checkpoint: from its record, or from what its files imply."""
    implied = record["model"] if "model" in record else _imply_fields(config, images)
    try:
        return TinyLlavaConfig(**{**config.to_dict(), **implied, "model_type": TinyLlavaConfig.model_type})
    except (*FAULTS, StrictDataclassError) as error:
        reason = shorten_error(error)
        raise UserError(f"the checkpoint's record does not describe its model: {reason}. Copy it again.") from None


def _imply_fields(config: LlavaConfig, images: Any) -> dict[str, Any]:
    """The fields of our config that Llava's config and its image processor imply."""
    prefix = find_family(config.vision_config).prefix_tokens(config.vision_config)
    size = images.crop_size or images.size
    side = size.get("height") or size.get("shortest_edge")
    if not side:
        raise UserError(f"the image processor makes images of the size {dict(size)}, expected squares of one size.")
    return {
        "connector": {"mlp": {"layers": 2, "act": config.projector_hidden_act}},
        "prefix_tokens": prefix,
        "drop_first_patch": prefix == 0,  # Llava's "default" always drops the first token
        "image_size": side,
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
    }


def check_image_token(directory: Path, config: LlavaConfig, processor: LlavaProcessor) -> None:
    """Raise UserError when config and tokenizer do not agree on the id of `<image>`."""
    if processor.image_token_id != config.image_token_id:
        raise UserError(
            f"{directory}/config.json says that <image> has the id {config.image_token_id}, and the tokenizer says"
            f" {processor.image_token_id}. Copy both again."
        )
