"""From a recipe's three boxes to one model and its processor.

    llm + vision_tower + connector  ->  TinyLlavaForConditionalGeneration, TinyLlavaProcessor

Parts come from a Hub id, a local directory, or a config with random weights. Whatever an LLM computes after its last
hidden state is found by comparing logits, never believed from a list of names.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinyllava.config import ModelSpec, VisionTowerSpec
from tinyllava.data.sample import IMAGE_TOKEN, Sample
from tinyllava.data.spans import has_token
from tinyllava.data.template import Template, add_image_token
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.model.configuration import TinyLlavaConfig
from tinyllava.model.image_processor import is_code, llava_image_processor, own_image_processor, read_fields
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration, make_connector
from tinyllava.model.parts import (
    fit_vocabulary,
    hub_answers,
    load_part,
    load_tokenizer,
    located,
    own_families,
    part_config,
    tower_names,
)
from tinyllava.model.processor import TinyLlavaProcessor, build_processor
from tinyllava.vision_towers import family_name

logger = logging.getLogger("tinyllava")
PROBED_LOGITS = 30.0  # the size of the logits at which an LLM's head is looked at: Gemma2's soft cap


def build(
    spec: ModelSpec, samples: Callable[[], Iterable[Sample]] = list, seed: int = 42, empty: bool = False
) -> tuple[TinyLlavaForConditionalGeneration, TinyLlavaProcessor, Template]:
    """Assemble the model of a recipe. `samples` yields training samples, for a tokenizer that is trained with the
    model.

    The seed covers every weight that is not loaded: random parts and the connector. With `empty` no weights are made
    or read (they lie on the meta device): enough to count and to prepare data. Raises UserError for parts that cannot
    be found, do not fit together, or compute what the model class cannot hold.
    """
    Factory("connectors").resolve(*next(iter(spec.connector.items())))  # a recipe's own code is imported here
    llm_config = part_config("llm", spec.llm)
    tower_config = part_config("vision_tower", spec.vision_tower)
    family = tower_family(tower_config)
    template = Template.load(spec.template or default_template(llm_config), compat=spec.compat)
    tokenizer = load_tokenizer(spec.llm, template, samples)
    knew_images = has_token(tokenizer, IMAGE_TOKEN)
    image_token_id = add_image_token(tokenizer)
    if spec.llm.config is not None:  # the config's LLM is as wide as its tokenizer, unless it says otherwise
        llm_config = fit_vocabulary(llm_config, tokenizer, spec.llm.config)
    set_seed(seed)
    with torch.device("meta") if empty else nullcontext():
        llm = load_part("llm", spec.llm, llm_config, AutoModelForCausalLM, spec.dtype, empty)
        tower = load_part("vision_tower", spec.vision_tower, tower_config, AutoModel, spec.dtype, empty)
        rows, needed = llm.get_input_embeddings().num_embeddings, max(len(tokenizer), image_token_id + 1)
        if needed > rows:  # Qwen and Phi have spare rows
            llm.resize_token_embeddings(needed, mean_resizing=not empty)
        new_tokens = sorted({*range(rows, needed), *([] if knew_images else [image_token_id])})
    images, image_size = tower_images(spec.vision_tower, tower.config)
    patches_only = spec.vision_tower.feature_strategy == "patch" and family.prefix_tokens(tower.config) > 0
    connector = copy.deepcopy(spec.connector)
    if tower.config.model_type == "mof" and "mof_mlp" in connector:  # which cannot see where a tower's channels end
        layers = spec.vision_tower.feature_layer
        width = tower.config.first.hidden_size * (1 if isinstance(layers, int) else len(layers))
        connector["mof_mlp"].setdefault("first_dim", width)
    config = TinyLlavaConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=copy.deepcopy(llm.config),
        connector=connector,
        prefix_tokens=family.prefix_tokens(tower.config),
        image_size=image_size,
        image_mean=list(images.image_mean),
        image_std=list(images.image_std),
        image_processor=spec.vision_tower.image_processor if is_code(spec.vision_tower.image_processor) else None,
        tiles=spec.vision_tower.tiles,
        image_token_index=image_token_id,
        new_tokens=new_tokens,
        families=own_families(spec, llm=llm_config, vision_tower=tower_config),
        vision_feature_layer=spec.vision_tower.feature_layer,
        vision_feature_select_strategy="default" if patches_only else "full",
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
        **({"head_bias": llm.get_output_embeddings().bias is not None} if empty else head_of(llm)),
    )
    check_feature_layers(config)
    with torch.device("meta") if empty else nullcontext():
        model = assemble(config, llm, tower, seed)
    config.image_seq_length = model.model.multi_modal_projector.num_tokens(config.num_patches)
    chat_template = template.chat_template(tokenizer)
    processor = build_processor(config, images, tokenizer, chat_template, config.image_seq_length)
    return model, processor, template


def assemble(
    config: TinyLlavaConfig, llm: PreTrainedModel, tower: PreTrainedModel, seed: int
) -> TinyLlavaForConditionalGeneration:
    """Put loaded parts into an empty model, and initialise the connector as the LLM initialises its own linear
    layers.
    """
    with torch.device("meta"):
        model = TinyLlavaForConditionalGeneration(config)
    set_seed(seed)  # whatever was drawn before (random parts or none), the connector starts from the same weights
    projector = make_connector(config)
    projector.apply(model._init_weights)
    model.model.vision_tower = tower
    model.model.language_model = llm.base_model
    model.model.multi_modal_projector = projector.to(dtype=llm.dtype)
    model.lm_head = llm.get_output_embeddings()
    model.config.vision_config, model.config.text_config = tower.config, llm.config
    model.config.dtype = llm.dtype
    if llm.generation_config is not None:
        model.generation_config = llm.generation_config
    model.generation_config.suppress_tokens = [config.image_token_id]  # a placeholder is never an answer
    model.tie_weights()
    return model


def tower_family(config: PreTrainedConfig) -> Any:
    """What is known about a tower, by its config's model_type. Raises UserError for one that nobody knows."""
    name, known = family_name(config), Factory("vision_towers").names()
    if name not in known:
        raise UserError(
            f"nothing is known about the vision tower '{name}'. Known: {', '.join(known)}."
            " Another takes a file with a few lines: docs/add-your-own-vision-tower.md."
        )
    return Factory("vision_towers").get(name)


def default_template(config: PreTrainedConfig) -> str:
    """The template of an LLM family, when a recipe names none: its file's, else the tokenizer's own chat template."""
    llms = Factory("llms")
    return llms.get(config.model_type).template if config.model_type in llms.names() else "native"


def tower_images(spec: VisionTowerSpec, config: PreTrainedConfig) -> tuple[BaseImageProcessor, int]:
    """The image processor and the side of the picture it makes: the user's own, the tower's, or the family's."""
    if is_code(spec.image_processor):
        return own_image_processor(spec.image_processor)
    own: dict[str, Any] = {}
    if spec.image_processor is not None:
        own = read_fields(spec.image_processor)
    elif spec.name is not None:
        name = located("vision_tower", tower_names(spec.name)[0])
        where = {"local_files_only": not Path(name).is_dir() and not hub_answers()}
        try:
            own = AutoImageProcessor.from_pretrained(name, backend="pil", **where).to_dict()
        except ImportError:  # DINOv3's needs torchvision: what its file says is all that we need
            own = ImageProcessingMixin.get_image_processor_dict(name, **where)[0]
        except OSError:
            logger.info("%s has no image processor of its own: using the family's settings", name)
    fields, image_size = image_fields(config, own)
    return llava_image_processor(fields, image_size, spec.image_aspect), image_size


def image_fields(config: PreTrainedConfig, own: Mapping[str, Any]) -> tuple[dict, int]:
    """The family's image processor with the fields of a Hugging Face one over it, and the side of the picture."""
    names = ("size", "crop_size", "do_center_crop", "image_mean", "image_std", "resample")
    fields = tower_family(config).image_processor(config) | {
        name: own[name] for name in names if own.get(name) is not None
    }
    cropped = fields.get("do_center_crop") and fields.get("crop_size")
    side = (fields["crop_size"] if cropped else fields["size"]).get("height", config.image_size)
    return fields, side


def check_feature_layers(config: TinyLlavaConfig) -> None:
    """Raise UserError when the tower lacks a layer that the recipe asks for."""
    layers = config.vision_config.num_hidden_layers
    wanted = config.vision_feature_layer
    for layer in [wanted] if isinstance(wanted, int) else wanted:
        if not -layers - 1 <= layer <= layers:
            raise UserError(
                f"vision_tower.feature_layer {layer}: the tower has {layers} layers."
                f" Ask for one of {-layers - 1} .. {layers}."
            )


@torch.no_grad()
def head_of(llm: PreTrainedModel) -> dict[str, Any]:
    """What the LLM does between its last hidden state and its logits: bias, scale, soft cap. Raises UserError for
    anything else.

    Llava keeps the base model and one linear layer; Phi-2's bias, Granite's scaling and Gemma2's cap would silently be
    lost.
    """
    head = llm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(llm).__name__} has no linear output head: it cannot be the LLM of a Llava model.")
    was_training = llm.training
    llm.eval()
    ids = torch.arange(8, device=llm.device).unsqueeze(0) % llm.config.vocab_size
    hidden: list[Tensor] = []

    def magnify(_module: nn.Module, _args: tuple, outputs: Any) -> None:  # or bfloat16's rounding hides a soft cap
        states = outputs.last_hidden_state
        outputs.last_hidden_state = states * (PROBED_LOGITS / head(states).float().std()).to(states.dtype)
        hidden.append(outputs.last_hidden_state)

    handle = llm.base_model.register_forward_hook(magnify)
    wanted = llm(ids, use_cache=False).logits.float()
    handle.remove()
    plain = head(hidden[0]).float()
    llm.train(was_training)
    bias = {"head_bias": head.bias is not None}
    scale = ((wanted * plain).sum() / (plain * plain).sum()).item()
    for exact in (
        1.0,
        getattr(llm.config, "logit_scale", None),
        1.0 / getattr(llm.config, "logits_scaling", 1.0),
        scale,
    ):
        if exact is not None and _equal(wanted, plain * exact, llm.dtype):
            return bias | {"head_scale": float(exact)}
    cap = getattr(llm.config, "final_logit_softcapping", None)
    if cap and _equal(wanted, torch.tanh(plain / cap) * cap, llm.dtype):
        return bias | {"head_softcap": float(cap)}
    raise UserError(
        f"{type(llm).__name__} changes its logits in a way the model class cannot hold"
        f" (off by {(wanted - plain).abs().max():.2g})."
        " It needs a file in llms/ and a place in TinyLlavaConfig."
    )


def _equal(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of the same logits agree, but for rounding."""
    return bool((a - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm())
