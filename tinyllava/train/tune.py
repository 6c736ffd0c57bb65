"""Three parts, three tunings, one model: compiles them into requires_grad, one LoraConfig and the optimiser's groups.

Any mix works, because each tuning only answers for its own part (tuning/__init__.py) and nothing here knows a tuning
by name.
"""

import re
from dataclasses import dataclass, fields

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import set_seed

from tinyllava.config import PARTS, Tune
from tinyllava.errors import UserError
from tinyllava.factory import Factory, nearest
from tinyllava.model.adapter import is_adapter
from tinyllava.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava.model.quantise import quantise, size
from tinyllava.model.tower import find_blocks
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


def select(model: TinyLlavaForConditionalGeneration, tune: Tune) -> dict[str, Selection]:
    """Each part's answer. Raises UserError when a tuning does not fit its part."""
    selections = {}
    for part in PARTS:
        ((name, options),) = getattr(tune, part).tuning.items()
        selections[part] = Factory("tuning").get(name)(**options).select(part_of(model, part))
    return selections


def apply_tuning(
    model: TinyLlavaForConditionalGeneration, tune: Tune, seed: int, selections: dict[str, Selection] | None = None
) -> list[Tuned]:
    """Set up `model` for one stage and return a row per part. The seed covers the adapters' initialisation.

    `selections` are those of `select`, if they were asked for before. Raises UserError when nothing would be trained,
    or when a tuning does not fit its part.
    """
    selections = selections or select(model, tune)
    model.requires_grad_(False)
    layers = {
        f"{PLACES[part]}.{name}": selection.quantisation
        for part, selection in selections.items()
        for name in selection.quantised
    }
    if layers:
        quantise(model, layers)
    if any(selection.lora_targets for selection in selections.values()):
        set_seed(seed)
        model.add_adapter(lora_config(selections))
    wanted = {f"{PLACES[part]}.{name}" for part in PARTS for name in selections[part].parameters}
    rows = {f"{PLACES[part]}.{name}": rows for part in PARTS for name, rows in selections[part].rows.items()}
    embeddings = f"{PLACES['llm']}.{model.embeddings_name()}.weight"
    if not model.config.tie_word_embeddings:  # what is said of the LLM's embeddings means its head as well
        if embeddings in wanted:
            wanted |= {f"lm_head.{name}" for name, _ in model.lm_head.named_parameters()}
        if embeddings in rows:
            rows["lm_head.weight"] = rows[embeddings]
    for name, parameter in model.named_parameters():
        name = name.replace(".base_layer.", ".")
        if name in wanted or is_adapter(name):
            parameter.requires_grad_(True)
        elif name in rows:
            train_rows(parameter, rows[name])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "every part is frozen, so there is nothing to train. Set one of tune.vision_tower, .connector, .llm."
        )
    return [_row(model, part, tune) for part in PARTS]


def train_rows(parameter: nn.Parameter, rows: list[int]) -> None:
    """Train these rows alone: the others' gradient is zero, and `parameter_groups` spares them the weight decay."""
    parameter.requires_grad_(True)
    parameter.trained_rows = rows

    def of_rows(gradient: Tensor) -> Tensor:
        index = torch.tensor(rows, device=gradient.device)
        return torch.zeros_like(gradient).index_copy_(0, index, gradient[index])

    parameter.register_hook(of_rows)


def part_of(model: TinyLlavaForConditionalGeneration, part: str) -> Part:
    """One part as its tuning sees it."""
    module = model.get_submodule(PLACES[part])
    names = [name for name, _ in module.named_parameters()]
    if part == "vision_tower":
        used = model.model.used_tower_parameters()
        names = [name for name in names if name in used]
    new = {}
    if part == "llm" and model.config.new_tokens:
        new = {f"{model.embeddings_name()}.weight": model.config.new_tokens}
    return Part(name=part, module=module, blocks=find_blocks(module), parameters=names, new_rows=new)


def lora_config(selections: dict[str, Selection]) -> LoraConfig:
    """One LoraConfig for all parts: ranks and alphas that differ between parts are patterns on the parts' names.

    Raises UserError when another field differs, or when peft has no such field.
    """
    adapted = {part: selection for part, selection in selections.items() if selection.lora_targets}
    known, shared = {field.name for field in fields(LoraConfig)}, {}
    for part, selection in adapted.items():
        for field, value in selection.lora.items():
            if field not in known:
                raise UserError(f"peft's LoraConfig has no field '{field}'{nearest(field, sorted(known))}")
            if field not in ("r", "lora_alpha") and shared.setdefault(field, (part, value))[1] != value:
                other, first = shared[field]
                raise UserError(
                    f"{field} is {first} for the {other} and {value} for the {part}, but peft has one for all parts."
                    " Make them equal."
                )
    own = {f"{re.escape(PLACES[part])}\\..*": LoraConfig(**selection.lora) for part, selection in adapted.items()}
    first, *others = own.values()
    patterns = own if others else {}
    return LoraConfig(
        r=first.r,
        lora_alpha=first.lora_alpha,
        target_modules=[
            f"{PLACES[part]}.{name}" for part, selection in adapted.items() for name in selection.lora_targets
        ],
        rank_pattern={pattern: config.r for pattern, config in patterns.items()},
        alpha_pattern={pattern: config.lora_alpha for pattern, config in patterns.items()},
        **{field: value for field, (_, value) in shared.items()},
    )


def unchanged(model: TinyLlavaForConditionalGeneration) -> list[str]:
    """The parts whose base weights are not trained: frozen ones, and those under an adapter."""
    changed = {
        part_of_parameter(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_adapter(name)
    }
    return [part for part in PARTS if part not in changed]


def layer_classes(model: TinyLlavaForConditionalGeneration) -> set[str]:
    """Names of the classes of the repeated layers of tower and LLM."""
    parts = (model.get_submodule(PLACES[part]) for part in ("vision_tower", "llm"))
    return {type(part.get_submodule(block)).__name__ for part in parts for block in find_blocks(part)}


def part_of_parameter(name: str) -> str:
    """Which of the three parts a parameter of the whole model belongs to; the head is the LLM's."""
    return next((part for part, place in PLACES.items() if name.startswith(place + ".")), "llm")


def parameter_groups(model: nn.Module, tune: Tune, lr: float, weight_decay: float, decayed: set[str]) -> list[dict]:
    """The optimiser's groups: each part at its own learning rate, biases and norms without weight decay (as HF
    Trainer's), and so are parameters of which only some rows are trained.
    """
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = part_of_parameter(name), name in decayed and not hasattr(parameter, "trained_rows")
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
    dtypes = {getattr(p, "quant_type", None) or str(p.dtype).removeprefix("torch.") for p in parameters}
    return Tuned(
        part=part,
        class_name=type(module).__name__ if part != "connector" else next(iter(model.config.connector)),
        tuning=f"{name} ({spelled})" if spelled else name,
        lr=getattr(tune, part).lr,
        parameters=sum(size(parameter) for parameter in parameters),
        trainable=sum(_trainable(parameter) for parameter in parameters if parameter.requires_grad),
        dtype=", ".join(sorted(dtypes)) or "-",
    )


def _trainable(parameter: nn.Parameter) -> int:
    rows = getattr(parameter, "trained_rows", None)
    return parameter.numel() if rows is None else len(rows) * parameter[0].numel()
