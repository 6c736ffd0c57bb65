"""Apply the tunings of the three parts to a model: requires_grad, one LoraConfig and the optimiser's groups.

Any mix of tunings works: each selects only from its own part (tuning/__init__.py), and this file knows no tuning by
name.
"""

import logging
import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import set_seed

from tinyllava.config import PART_TITLES, PARTS, Tune
from tinyllava.errors import UserError
from tinyllava.factory import Factory, suggest_nearest
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.modules import MODULES, find_blocks, find_part, is_adapter
from tinyllava.model.quantise import count_weights, quantise
from tinyllava.tuning import Selection, TunablePart

logger = logging.getLogger("tinyllava")


@dataclass(frozen=True)
class TunedPart:
    """How one part is trained: a row of the table that `look` and every stage show."""

    part: str
    class_name: str
    tuning: str
    lr: float | None  # None: the stage's learning rate
    parameters: int
    trainable: int
    dtype: str

    @property
    def title(self) -> str:
        """The part's name in messages: vision tower, connector, LLM."""
        return PART_TITLES[self.part]


def select_tuning(model: TinyLlavaForConditionalGeneration, tune: Tune) -> dict[str, Selection]:
    """The selection of each part's tuning. Raises UserError when a tuning does not fit its part."""
    selections = {}
    for part in PARTS:
        ((name, options),) = getattr(tune, part).tuning.items()
        selections[part] = Factory("tuning").get(name)(**options).select(get_tunable_part(model, part))
    return selections


def apply_tuning(
    model: TinyLlavaForConditionalGeneration, tune: Tune, seed: int, selections: dict[str, Selection] | None = None
) -> list[TunedPart]:
    """Prepare `model` for the tuning of one stage, and return a row for each part.

    seed: of the adapters' initialisation. selections: from `select_tuning`, if it was called before. Raises UserError
    when nothing would be trained, or when a tuning does not fit its part.
    """
    selections = selections or select_tuning(model, tune)
    model.requires_grad_(False)
    layers = {}
    for part, selection in selections.items():
        layers |= {f"{MODULES[part]}.{name}": selection.quantisation for name in selection.quantised}
    if layers:
        quantise(model, layers)
    if any(selection.lora_targets for selection in selections.values()):
        set_seed(seed)
        model.add_adapter(make_lora_config(selections))
    train_selected(model, selections)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "every part is frozen, so there is nothing to train. Set tune.vision_tower, .connector or .llm."
        )
    new = {*(model.config.new_tokens or [])} - {model.config.image_token_id}
    if new and not model.get_input_embeddings().weight.requires_grad:
        remedy = "{embeddings: {}}, {lora: {new_tokens: true}} or full"
        logger.warning(
            "%d new tokens of the LLM are not trained in this stage. With tune.llm %s, they are.", len(new), remedy
        )
    return describe_parts(model, tune)


def describe_parts(model: TinyLlavaForConditionalGeneration, tune: Tune) -> list[TunedPart]:
    """A row for each part of a tuned model."""
    return [_describe_part(model, part, tune) for part in PARTS]


def train_selected(model: TinyLlavaForConditionalGeneration, selections: Mapping[str, Selection]) -> None:
    """Set requires_grad on the selected parameters, on the selected rows of parameters, and on adapters."""
    selected = {f"{MODULES[part]}.{name}" for part in PARTS for name in selections[part].parameters}
    rows = {f"{MODULES[part]}.{name}": rows for part in PARTS for name, rows in selections[part].rows.items()}
    embeddings = f"{MODULES['llm']}.{model.get_embeddings_name()}.weight"
    # What a tuning selects of the LLM's embeddings, it also selects of the output head.
    if not model.config.tie_word_embeddings:
        if embeddings in selected:
            selected |= {f"lm_head.{name}" for name, _ in model.lm_head.named_parameters()}
        if embeddings in rows:
            rows["lm_head.weight"] = rows[embeddings]
    for name, parameter in model.named_parameters():
        name = name.replace(".base_layer.", ".")  # under an adapter, peft gives the layer one more level
        if name in selected or is_adapter(name):
            parameter.requires_grad_(True)
        elif name in rows:
            train_rows(parameter, rows[name])


def train_rows(parameter: nn.Parameter, rows: list[int]) -> None:
    """Train only these rows. The gradient of the others is zero, and no row gets weight decay."""
    parameter.requires_grad_(True)
    parameter.trained_rows = rows

    def keep_rows(gradient: Tensor) -> Tensor:
        index = torch.tensor(rows, device=gradient.device)
        return torch.zeros_like(gradient).index_copy_(0, index, gradient[index])

    parameter.register_hook(keep_rows)


def get_tunable_part(model: TinyLlavaForConditionalGeneration, part: str) -> TunablePart:
    """One part as its tuning sees it."""
    module = model.get_submodule(MODULES[part])
    names = [name for name, _ in module.named_parameters()]
    if part == "vision_tower":
        used = model.model.find_used_tower_parameters()
        names = [name for name in names if name in used]
    new_tokens = model.config.new_tokens if part == "llm" else None
    new_rows = {f"{model.get_embeddings_name()}.weight": new_tokens} if new_tokens else {}
    return TunablePart(name=part, module=module, blocks=find_blocks(module), parameters=names, new_rows=new_rows)


def make_lora_config(selections: Mapping[str, Selection]) -> LoraConfig:
    """One LoraConfig for all parts. Different ranks and alphas become patterns on the names of the parts' modules.

    Raises UserError when another field differs, or when peft has no such field.
    """
    adapted = {part: selection for part, selection in selections.items() if selection.lora_targets}
    _check_fields(adapted)
    configs = {f"{re.escape(MODULES[part])}\\..*": LoraConfig(**selection.lora) for part, selection in adapted.items()}
    patterns = configs if len(configs) > 1 else {}
    return LoraConfig(
        **ChainMap(*(selection.lora for selection in adapted.values())),  # of several ranks, the first part's
        target_modules=[
            f"{MODULES[part]}.{name}" for part, selection in adapted.items() for name in selection.lora_targets
        ],
        rank_pattern={pattern: config.r for pattern, config in patterns.items()},
        alpha_pattern={pattern: config.lora_alpha for pattern, config in patterns.items()},
    )


def _check_fields(adapted: Mapping[str, Selection]) -> None:
    """Raise UserError unless peft has these fields, and those except rank and alpha are equal for all adapted parts."""
    known = {field.name for field in fields(LoraConfig)}
    set_first: dict[str, tuple[str, Any]] = {}  # {field: (the first part that sets it, value)}
    for part, selection in adapted.items():
        for field, value in selection.lora.items():
            if field not in known:
                raise UserError(f"peft's LoraConfig has no field '{field}'{suggest_nearest(field, sorted(known))}")
            first, agreed = set_first.setdefault(field, (part, value))
            if agreed != value and field not in ("r", "lora_alpha"):
                raise UserError(
                    f"{field} is {agreed} for the {first} and {value} for the {part}, but peft has one for all parts."
                    " Make them equal."
                )


def find_layer_classes(model: TinyLlavaForConditionalGeneration) -> set[str]:
    """Names of the classes of the repeated layers of vision tower and LLM."""
    parts = (model.get_submodule(MODULES[part]) for part in ("vision_tower", "llm"))
    return {type(part.get_submodule(block)).__name__ for part in parts for block in find_blocks(part)}


def make_parameter_groups(
    model: nn.Module, tune: Tune, lr: float, weight_decay: float, decayed: set[str]
) -> list[dict[str, Any]]:
    """The optimiser's groups: each part at its own learning rate.

    Biases and norms get no weight decay, as in HF Trainer (`decayed` names the other parameters). Parameters with
    `trained_rows` get none either: it would shrink the rows that must not change.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = find_part(name)
        decays = name in decayed and not hasattr(parameter, "trained_rows")
        group = groups.setdefault((part, decays), {"params": [], "part": part})
        group |= {"lr": getattr(tune, part).lr or lr, "weight_decay": weight_decay if decays else 0.0}
        group["params"].append(parameter)
    return list(groups.values())


def compute_learning_rates(groups: list[dict[str, Any]], first_rate: float) -> dict[str, float]:
    """{lr/PART: its learning rate now}. first_rate: that of the first group."""
    # All groups follow one schedule, so the ratio of their rates does not change.
    rates = {f"lr/{group['part']}": group.get("initial_lr", group["lr"]) for group in groups}
    first = next(iter(rates.values()))
    return {name: first_rate * (rate / first if first else 1.0) for name, rate in rates.items()}


def _describe_part(model: TinyLlavaForConditionalGeneration, part: str, tune: Tune) -> TunedPart:
    module = model.get_submodule(MODULES[part])
    parameters = list(module.parameters())
    if part == "llm" and not model.config.tie_word_embeddings:
        parameters += list(model.lm_head.parameters())
    ((name, options),) = getattr(tune, part).tuning.items()
    listed = ", ".join(f"{key} {value}" for key, value in options.items())
    dtypes = {getattr(p, "quant_type", None) or str(p.dtype).removeprefix("torch.") for p in parameters}
    return TunedPart(
        part=part,
        class_name=type(module).__name__ if part != "connector" else next(iter(model.config.connector)),
        tuning=f"{name} ({listed})" if listed else name,
        lr=getattr(tune, part).lr,
        parameters=sum(count_weights(parameter) for parameter in parameters),
        trainable=sum(_count_trainable(parameter) for parameter in parameters if parameter.requires_grad),
        dtype=", ".join(sorted(dtypes)) or "-",
    )


def _count_trainable(parameter: nn.Parameter) -> int:
    rows = getattr(parameter, "trained_rows", None)
    return parameter.numel() if rows is None else len(rows) * parameter[0].numel()
