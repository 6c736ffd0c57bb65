"""Which other programs can run a checkpoint as it is: transformers, PEFT, vLLM and llama.cpp.

The record of every checkpoint holds this table; `look`, `train` and `export` print it. It knows the limits of these
programs, and no class of ours. tests/engines compares the answers of vLLM 0.32 with ours.
"""

from collections.abc import Mapping
from typing import Any

TOWERS = {"clip_vision_model", "siglip_vision_model"}  # Llava's, in vLLM and in llama.cpp
COMPARED_LLMS = {"gemma", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "stablelm"}
# Of vLLM's projector. The connectors `linear` and `identity` are a projector with the activation `linear`.
ACTIVATIONS = {"gelu", "gelu_new", "relu", "silu"}
# The class that config.json names beside an adapter. transformers goes by `model_type`; vLLM and llama.cpp go by the
# class, and would serve the base without its adapter. They refuse a class that they do not know, and print its name.
UNMERGED_CLASS = "LlavaWithAdapter_run_tinyllava_export"
UNMERGED = "it does not apply an adapter. `tinyllava export DIR --to merged` merges it, `--to adapter` writes it apart"
SPLIT = "`tinyllava export DIR --to split`, if llama.cpp has the LLM and its tokenizer"


def list_engines(config: Any, act: str | None, not_plain: str | None, has_adapter: bool) -> dict[str, str]:
    """{engine: `yes`, `no: reason`, `not tested: reason` or `through: command`} for a directory DIR.

    config: of the model. act: the activation of its connector, if that has the form of Llava's projector. not_plain:
    why the directory is not plain llava.
    """
    tower, adapter = _list_tower_limits(config), [UNMERGED] if has_adapter else []
    vllm = [not_plain] if not_plain else [*tower, *_list_connector_limits(config, act, ACTIVATIONS), *adapter]
    llama_cpp = [*tower, *list_projector_limits(config, act)]
    llm = config.text_config.model_type
    ours = "yes" if not_plain is None else f"yes, after `import tinyllava.model.vlm`: {not_plain}"
    untested = "yes" if llm in COMPARED_LLMS else f"not tested: a {llm} LLM"
    return {
        "transformers": ours,
        "PEFT": ours if has_adapter else "no: there is no adapter",
        "vLLM": f"no: {vllm[0]}" if vllm else untested,
        "llama.cpp": f"no: {llama_cpp[0]}" if llama_cpp else f"through {SPLIT}",
    }


def list_projector_limits(config: Any, act: str | None) -> list[str]:
    """Why llama.cpp's Llava projector does not compute this connector.

    It applies GELU between two layers to the whole image without the CLS token, whatever the files say.
    """
    limits = _list_connector_limits(config, act, {"gelu"})
    if config.tiles is not None:
        limits.append("it sees each image only as a whole, and this model cuts it into tiles")
    if config.dropped_tokens != config.prefix_tokens:
        limits.append("it drops the tower's CLS token and nothing else")
    return limits


def list_lines(engines: Mapping[str, str], directory: str) -> list[str]:
    """The table as lines. `directory` stands where its commands say DIR."""
    return [f"{engine:<12} {answer.replace(' DIR', f' {directory}')}" for engine, answer in engines.items()]


def _list_tower_limits(config: Any) -> list[str]:
    tower, limits = config.vision_config.model_type, []
    if tower not in TOWERS:
        limits.append(f"it does not have the vision tower {tower}. Train with CLIP or SigLIP")
    if not isinstance(config.vision_feature_layer, int):
        limits.append("it takes the features of one layer")
    return limits


def _list_connector_limits(config: Any, act: str | None, known: set[str]) -> list[str]:
    (connector,) = config.connector
    return [] if act in known else [f"it does not have the connector {connector}. Train with mlp2x_gelu"]
