"""A checkpoint taken apart: each part in a directory of its own, as its own class saves it.

    OUT/llm/            an ordinary LLM with its tokenizer: AutoModelForCausalLM loads it, llama.cpp converts it
    OUT/vision_tower/   an ordinary tower with its image processor: AutoModel loads it; a mixture's: first/ and second/
    OUT/connector/      its weights and config.json; where it is Llava's, llava.projector, which llama.cpp reads

A recipe takes the first two back by path: `llm: OUT/llm`, `vision_tower: OUT/vision_tower`.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tinyllava.model.layout import NESTED_TOWERS, PREFIXES, as_llava
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processor import TinyLlavaProcessor

State = dict[str, Tensor]


def write_split(model: TinyLlavaForConditionalGeneration, processor: TinyLlavaProcessor, directory: Path) -> None:
    """Write the three parts of a model without an adapter."""
    write_llm(model, directory / "llm")
    model.generation_config.save_pretrained(directory / "llm")
    processor.tokenizer.save_pretrained(directory / "llm")
    tower, place = model.model.vision_tower, directory / "vision_tower"
    members = {"first": tower.first, "second": tower.second} if tower.config.model_type == "mof" else {"": tower}
    for name, member in members.items():
        write_tower(member, place / name, model.config.vision_feature_layer)
        processor.image_processor.save_pretrained(place / name)
    write_connector(model, directory / "connector")


def write_llm(model: TinyLlavaForConditionalGeneration, directory: Path) -> None:
    """The LLM with its own head, which scales, caps or adds a bias by itself."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config), dtype=model.dtype)
    head = next(name for name, module in llm.named_modules() if module is llm.get_output_embeddings())
    state = with_prefix(model.model.language_model.state_dict(), f"{llm.base_model_prefix}.")
    llm.save_pretrained(directory, state_dict=state | with_prefix(model.lm_head.state_dict(), f"{head}."))


def write_tower(tower: PreTrainedModel, directory: Path, feature_layer: int | list[int]) -> None:
    """A tower under its published names. Its config says which layer the model looks at, for llama.cpp's converter."""
    nested = "vision_model." if tower.config.model_type in NESTED_TOWERS else ""
    tower.save_pretrained(directory, state_dict=with_prefix(tower.state_dict(), nested))
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"vision_feature_layer": feature_layer}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_connector(model: TinyLlavaForConditionalGeneration, directory: Path) -> None:
    """The connector's weights and what is needed to make it and to feed it."""
    directory.mkdir(parents=True)
    connector, config = model.model.multi_modal_projector, model.config
    state = {name: tensor.detach().contiguous() for name, tensor in connector.state_dict().items()}
    save_file(state, directory / "connector.safetensors", metadata={"format": "pt"})
    names = ("connector", "vision_feature_layer", "vision_feature_select_strategy", "image_size", "image_seq_length")
    facts = {name: getattr(config, name) for name in (*names, "image_mean", "image_std", "tiles")}
    facts |= {"vision_dim": config.vision_config.hidden_size, "text_dim": config.text_config.hidden_size}
    (directory / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if getattr(connector, "llava_projector", lambda: None)() is not None and not config.tiles:
        prefix = PREFIXES["connector"]
        projector = as_llava(model, with_prefix(state, prefix), prefix)
        torch.save({name: tensor.float() for name, tensor in projector.items()}, directory / "llava.projector")


def with_prefix(state: State, prefix: str) -> State:
    """The same tensors, on the CPU, with `prefix` before their names."""
    return {prefix + name: tensor.detach().cpu() for name, tensor in state.items()}
