"""Write the adapter of a checkpoint apart from its base, in the form that vLLM serves as a LoRA module.

    OUT/base/      a checkpoint without the adapter: the trained connector, and the LLM that the adapter was trained on
    OUT/adapter/   adapter_config.json and adapter_model.safetensors, which hold only the LoRA layers of the LLM

    vllm serve OUT/base --enable-lora --max-lora-rank 64 --lora-modules mine=OUT/adapter

vLLM adapts the LLM only. Adapters of the vision tower and of the connector are therefore merged into the base.
"""

import copy
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from tinyllava import checkpoint
from tinyllava.checkpoint.adapter import ADAPTER, PEFT_PREFIX, has_adapter, hash_weights, map_adapter_names
from tinyllava.checkpoint.weight_files import find_base_files
from tinyllava.errors import UserError
from tinyllava.files import read_json
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.vlm import VLM
from tinyllava.record import write_record

LLM = "model.language_model."
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of vLLM's --max-lora-rank
# The linear layers that vLLM's Llava can adapt. Phi-3 has others: qkv_proj and gate_up_proj.
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Fields of peft's LoraConfig that change what an adapter computes, and that vLLM does not have.
NOT_SERVED = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)


def write_lora_module(vlm: VLM, directory: Path, name: Path, run: Mapping[str, Any]) -> None:
    """Write base/ and adapter/ into `directory`, which will be renamed to `name`.

    The model of `vlm` is the base afterwards. run: for the record. Raises UserError if vLLM cannot serve the adapter.
    """
    model = vlm.model
    config = make_llm_config(model)
    state = model.state_dict()
    adapter = {stored: state[own] for stored, own in map_adapter_names(model, state).items() if own.startswith(LLM)}
    tensors = {f"{PEFT_PREFIX}{stored}": tensor.detach().cpu().contiguous() for stored, tensor in adapter.items()}
    (directory / "adapter").mkdir(parents=True)
    config.base_model_name_or_path = str((name / "base").resolve())
    config.save_pretrained(directory / "adapter")
    remove_adapter(model)
    checkpoint.save(vlm, directory / "base", run)
    base = hash_weights(find_base_files(directory / "base"))
    save_file(tensors, directory / "adapter" / ADAPTER, metadata={"format": "pt", "base": json.dumps(base)})
    record = read_json(directory / "base" / checkpoint.RECORD)
    write_record(directory / "adapter", {name: record[name] for name in ("format", "model", "run")})


def make_llm_config(model: TinyLlavaForConditionalGeneration) -> LoraConfig:
    """The config of the LLM's adapter alone. Raises UserError if there is none, or if vLLM cannot serve it."""
    if not has_adapter(model):
        raise UserError("the checkpoint has no adapter: use --to hf.")
    config = copy.deepcopy(model.peft_config["default"])
    merge = "Use --to hf, which merges the adapter into the weights."
    for field in NOT_SERVED:
        if getattr(config, field, None):
            raise UserError(f"the adapter was trained with {field}, which vLLM cannot serve. {merge}")
    if config.bias != "none":
        raise UserError(f"the adapter was trained with bias: {config.bias}, which vLLM cannot serve. {merge}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(LLM) and isinstance(module, BaseTunerLayer)
    }
    if not layers:
        raise UserError(f"the LLM has no adapter, and vLLM adapts only the LLM. {merge}")
    if unknown := sorted({name.rpartition(".")[2] for name in layers} - LAYERS):
        raise UserError(f"vLLM cannot adapt the layers {', '.join(unknown)} of this LLM. {merge}")
    ranks = {layer.r["default"] for layer in layers.values()}
    alphas = {layer.lora_alpha["default"] for layer in layers.values()}
    if max(ranks) > RANKS[-1]:
        raise UserError(f"the adapter has rank {max(ranks)}, and vLLM serves at most {RANKS[-1]}. {merge}")
    if len(ranks) == len(alphas) == 1:  # else the patterns on names stay
        config.r, config.lora_alpha = ranks.pop(), alphas.pop()
        config.rank_pattern, config.alpha_pattern = {}, {}
    config.target_modules, config.modules_to_save, config.inference_mode = sorted(layers), None, True
    return config


def remove_adapter(model: TinyLlavaForConditionalGeneration) -> None:
    """Take the adapter out of the LLM, and merge it into the weights of the other parts."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if not name.startswith(LLM):
                module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False


def make_serve_command(directory: Path) -> str:
    """The command that serves what `write_lora_module` wrote."""
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max(config["r"], *config["rank_pattern"].values(), 0)
    largest = next(allowed for allowed in RANKS if allowed >= rank)
    name, directory = shlex.quote(directory.name), shlex.quote(str(directory))
    lora = f"--enable-lora --max-lora-rank {largest} --lora-modules {name}={directory}/adapter"
    return f"vllm serve {directory}/base {lora}"
