"""Split a checkpoint: write each part into its own directory, in the format of its own class.

    OUT/llm/            an ordinary LLM with its tokenizer: AutoModelForCausalLM loads it, llama.cpp converts it
    OUT/vision_tower/   an ordinary tower with its image processor: AutoModel loads it; of a mixture: first/ and second/
    OUT/connector/      its weights and config.json; also llava.projector for llama.cpp, if it can run it

A recipe can use the first two by path: `llm: OUT/llm`, `vision_tower: OUT/vision_tower`.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tinyllava.checkpoint.layout import NESTED_TOWERS, PREFIXES, to_llava_projector
from tinyllava.engines import list_projector_limits
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.processor import clean_tokenizer
from tinyllava.model.vlm import VLM
from tinyllava.vision_towers import CompositeTower

State = dict[str, Tensor]


def write_split(vlm: VLM, directory: Path) -> None:
    """Write the three parts of a model without an adapter."""
    model = vlm.model
    write_llm(model, directory / "llm")
    model.generation_config.save_pretrained(directory / "llm")
    clean_tokenizer(vlm.tokenizer)
    vlm.tokenizer.save_pretrained(directory / "llm")
    tower, folder = model.model.vision_tower, directory / "vision_tower"
    members = tower.members if isinstance(tower, CompositeTower) else {"": tower}
    for name, member in members.items():
        write_tower(member, folder / name, model.config.vision_feature_layer)
        vlm.processor.image_processor.save_pretrained(folder / name)
    write_connector(model, directory / "connector")


def write_llm(model: TinyLlavaForConditionalGeneration, directory: Path) -> None:
    """Write the LLM as its own class, whose head applies a bias, scale or soft cap itself."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config), dtype=model.dtype)
    head = next(name for name, module in llm.named_modules() if module is llm.get_output_embeddings())
    state = add_prefix(model.model.language_model.state_dict(), f"{llm.base_model_prefix}.")
    llm.save_pretrained(directory, state_dict=state | add_prefix(model.lm_head.state_dict(), f"{head}."))


def write_tower(tower: PreTrainedModel, directory: Path, feature_layer: int | list[int]) -> None:
    """Write a vision tower under its published names. Its config names the feature layer, for llama.cpp's converter."""
    nested = "vision_model." if tower.config.model_type in NESTED_TOWERS else ""
    tower.save_pretrained(directory, state_dict=add_prefix(tower.state_dict(), nested))
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"vision_feature_layer": feature_layer}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_connector(model: TinyLlavaForConditionalGeneration, directory: Path) -> None:
    """Write the connector's weights, and the settings to build and use it."""
    directory.mkdir(parents=True)
    connector, config = model.model.multi_modal_projector, model.config
    state = {name: tensor.detach().contiguous() for name, tensor in connector.state_dict().items()}
    save_file(state, directory / "connector.safetensors", metadata={"format": "pt"})
    names = ("connector", "vision_feature_layer", "vision_feature_select_strategy", "image_size", "image_seq_length")
    settings = {name: getattr(config, name) for name in (*names, "image_mean", "image_std", "tiles")}
    settings |= {"vision_dim": config.vision_config.hidden_size, "text_dim": config.text_config.hidden_size}
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    act = (getattr(connector, "llava_projector", lambda: None)() or {}).get("projector_hidden_act")
    if not list_projector_limits(config, act):  # llama.cpp would misread any other
        prefix = PREFIXES["connector"]
        projector = to_llava_projector(model, add_prefix(state, prefix), prefix)
        torch.save({name: tensor.float() for name, tensor in projector.items()}, directory / "llava.projector")


def add_prefix(state: State, prefix: str) -> State:
    """Return the tensors on the CPU, with `prefix` before their names."""
    return {prefix + name: tensor.detach().cpu() for name, tensor in state.items()}
