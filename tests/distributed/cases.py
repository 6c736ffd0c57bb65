"""The cases of `make test-distributed`: an engine, a tuning and a connector, each trained for a few steps.

The whole product has 140 cases. Every pair of an engine with a tuning or a connector, and of a tuning with a connector,
occurs in a fixed sample of 37, which `.ci/run` trains. `make test-distributed-full` trains all.
"""

from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import CLIP, LLAMA, tiny_model
from tests.test_matrix import HALF, QFORMER
from tinyllava.config import Recipe

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
    "fsdp": {"fsdp": "full_shard"},
}
LORA = {"lora": {"r": 4, "alpha": 8}}
TUNINGS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "full": {"llm": "full", "vision_tower": "full"},
    "partial": {"llm": {"partial": {"last": 1}}, "vision_tower": {"partial": {"last": 2}}},
    "lora": {"llm": {"lora": {"r": 4, "alpha": 8}, "lr": 5e-3}, "vision_tower": LORA},
    "qlora": {"llm": {"qlora": {"r": 4, "alpha": 8}}},
}
DORA = {"lora": {"r": 4, "alpha": 8, "use_dora": True}}
CONNECTORS: dict[str, Any] = {
    "identity": "identity",
    "linear": "linear",
    "mlp": "mlp2x_gelu",
    "resampler": {"resampler": {"num_queries": 5, "layers": 1}},
    "qformer": {"qformer": QFORMER},
    "mof_mlp": "mof_mlp",
    "pixel_shuffle_mlp": "pixel_shuffle_mlp",
}
WIDE = {**CLIP, "hidden_size": LLAMA["hidden_size"]}  # `identity` fits
MIXTURE = {"model_type": "mof", "first": {**CLIP, **HALF}, "second": {**CLIP, **HALF}}
GLOBAL_BATCH = 6  # of 1, 2 and 3 processes
STEPS, SAVED = 4, 2  # 24 samples are an epoch of 4 steps; a checkpoint after the second and the fourth
TRAINER = {
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "save_steps": SAVED,
    "num_train_epochs": 1,
    "report_to": "none",
    "dataloader_num_workers": 0,
    "per_device_train_batch_size": 1,  # in each step, one process has an image while another has text alone
}


class Case(NamedTuple):
    """What is trained, and with which engine."""

    engine: str
    tuning: str
    connector: str

    @property
    def name(self) -> str:
        """The case as the name of a directory."""
        return "-".join(self)

    @property
    def reference(self) -> str:
        """The name of the run in one process that this case must equal."""
        return f"{self.tuning}-{self.connector}"

    @property
    def is_refused(self) -> bool:
        """Whether packed weights would be sharded."""
        return self.tuning == "qlora" and self.engine in ("zero3", "fsdp")


ALL = [Case(*case) for case in product(ENGINES, TUNINGS, CONNECTORS)]


def choose_sample(cases: list[Case]) -> list[Case]:
    """Choose few cases that contain every pair of values. Each next case has the most new pairs.

    A refused case trains nothing, so it covers only its engine with its tuning.
    """
    pairs = {case: set(combinations(enumerate(case[: 2 if case.is_refused else 3]), 2)) for case in cases}
    left, seen, chosen = set().union(*pairs.values()), Counter(), []
    while left:
        chosen.append(max(cases, key=lambda case: (len(pairs[case] & left), -sum(seen[value] for value in case))))
        left -= pairs[chosen[-1]]
        seen.update(chosen[-1])
    return chosen


SAMPLE = choose_sample(ALL)


def make_recipe(case: Case, pictures: Path, engine: str | None = None, **trainer: Any) -> Recipe:
    """One stage on instructions with and without an image. engine: replaces that of the case; `one` is one process."""
    tune = {**TUNINGS, "dora": {"llm": DORA, "vision_tower": DORA}}[case.tuning]
    if (case.tuning, case.connector) == ("frozen", "identity"):  # nothing of it could be trained
        tune = {"vision_tower": {"partial": {"last": 2}}}
    tower = MIXTURE if case.connector == "mof_mlp" else WIDE
    options = {"one": {}, **ENGINES}[engine or case.engine]
    stage = {
        "data": [{"path": str(pictures / "mixed.json")}],
        "tune": tune,
        "global_batch_size": GLOBAL_BATCH,
        "trainer": {**TRAINER, **options, **trainer},
    }
    model = tiny_model(tower=tower, connector=CONNECTORS[case.connector])
    return Recipe.model_validate({"model": model, "stages": {"finetune": stage}})
