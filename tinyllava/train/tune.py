"""Three parts, three tunings, one model: compiles them into requires_grad, one LoraConfig and the optimiser's groups.

Any mix works, because each tuning only answers for its own part (tuning/__init__.py) and nothing here knows a tuning
by name.
"""

import re
from dataclasses import dataclass

from peft import LoraConfig
from torch import nn
from transformers import set_seed

from tinyllava.config import PARTS, Tune
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration, find_blocks
from tinyllava.tuning import Part, Selection

PLACES = {
    "vision_tower": "model.vision_tower",
    "connector": "model.multi_modal_projector",
    "llm": "model.language_model",
}


@dataclass(frozen=True)
class Tuned:
    """What became of one part: a row of the table that `look` and the start of a stage show."""

    part: str
    class_name: str
    tuning: str
    lr: float | None  # None: the stage's learning rate
    parameters: int
    trainable: int
    dtype: str


def apply_tuning(model: TinyLlavaForConditionalGeneration, tune: Tune, seed: int) -> list[Tuned]:
    """Set up `model` for one stage and return a row per part. The seed covers the adapters' initialisation.

    Raises UserError when nothing would be trained, or when a tuning does not fit its part.
    """
    selections = {}
    for part in PARTS:
        ((name, options),) = getattr(tune, part).tuning.items()
        selections[part] = Factory("tuning").get(name)(**options).select(part_of(model, part))
    model.requires_grad_(False)
    targets = {f"{PLACES[part]}.{name}" for part in PARTS for name in selections[part].lora_targets}
    if targets:
        set_seed(seed)
        model.add_adapter(lora_config(selections))
    wanted = {f"{PLACES[part]}.{name}" for part in PARTS for name in selections[part].parameters}
    tied = model.config.tie_word_embeddings
    embeddings = f"{PLACES['llm']}.{model.embeddings_name()}.weight"
    if not tied and embeddings in wanted:  # `full` of the LLM means its head as well
        wanted |= {f"lm_head.{name}" for name, _ in model.lm_head.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.replace(".base_layer.", ".") in wanted or ".lora_" in name:
            parameter.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "every part is frozen, so there is nothing to train. Set one of tune.vision_tower, .connector, .llm."
        )
    return [_row(model, part, tune) for part in PARTS]


def part_of(model: TinyLlavaForConditionalGeneration, part: str) -> Part:
    """One part as its tuning sees it."""
    module = model.get_submodule(PLACES[part])
    names = [name for name, _ in module.named_parameters()]
    if part == "vision_tower":
        used = model.model.used_tower_parameters()
        names = [name for name in names if name in used]
    return Part(name=part, module=module, blocks=find_blocks(module), parameters=names)


def lora_config(selections: dict[str, Selection]) -> LoraConfig:
    """One LoraConfig for all parts: ranks and alphas that differ between parts are patterns on the parts' names."""
    adapted = {part: selection for part, selection in selections.items() if selection.lora_targets}
    first, *others = adapted.values()
    dropouts = {selection.lora["dropout"] for selection in adapted.values()}
    if len(dropouts) > 1:
        raise UserError(
            f"LoRA dropouts differ between parts ({', '.join(map(str, sorted(dropouts)))}), but peft has one for all."
            " Make them equal."
        )
    patterns = (
        {f"{re.escape(PLACES[part])}\\..*": selection.lora for part, selection in adapted.items()} if others else {}
    )
    return LoraConfig(
        r=first.lora["r"],
        lora_alpha=first.lora["alpha"],
        lora_dropout=first.lora["dropout"],
        target_modules=[
            f"{PLACES[part]}.{name}" for part, selection in adapted.items() for name in selection.lora_targets
        ],
        rank_pattern={pattern: lora["r"] for pattern, lora in patterns.items()},
        alpha_pattern={pattern: lora["alpha"] for pattern, lora in patterns.items()},
    )


def part_of_parameter(name: str) -> str:
    """Which of the three parts a parameter of the whole model belongs to; the head is the LLM's."""
    return next((part for part, place in PLACES.items() if name.startswith(place + ".")), "llm")


def parameter_groups(model: nn.Module, tune: Tune, lr: float, weight_decay: float, decayed: set[str]) -> list[dict]:
    """The optimiser's groups: each part at its own learning rate, biases and norms without weight decay (as HF
    Trainer's).
    """
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = part_of_parameter(name), name in decayed
        group = groups.setdefault(
            (part, decays),
            {
                "params": [],
                "lr": getattr(tune, part).lr or lr,
                "weight_decay": weight_decay if decays else 0.0,
                "part": part,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _row(model: TinyLlavaForConditionalGeneration, part: str, tune: Tune) -> Tuned:
    module = model.get_submodule(PLACES[part])
    parameters = list(module.parameters())
    if part == "llm" and not model.config.tie_word_embeddings:
        parameters += list(model.lm_head.parameters())
    ((name, options),) = getattr(tune, part).tuning.items()
    spelled = ", ".join(f"{key} {value}" for key, value in options.items())
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in parameters}
    return Tuned(
        part=part,
        class_name=type(module).__name__ if part != "connector" else next(iter(model.config.connector)),
        tuning=f"{name} ({spelled})" if spelled else name,
        lr=getattr(tune, part).lr,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        dtype=", ".join(sorted(dtypes)) or "-",
    )
