"""The training runs, each made once for all tests: in one process, then in two, then in three."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_pictures
from tests.distributed.cases import ALL, ENGINES, GLOBAL_BATCH, SAMPLE, SAVED, Case, make_recipe
from tests.distributed.launch import Job, Ran, interrupt, run_jobs
from tinyllava.config import Recipe
from tinyllava.train import stage
from tinyllava.train.plan import Plan

IS_RUN = bool(os.environ.get("TINYLLAVA_DISTRIBUTED"))
PIPELINES = (("zero3", "ddp"), ("fsdp", "zero2"), ("fsdp", "ddp"), ("zero2", "fsdp"), ("ddp", "zero3"))
MORE = tuple(Case(engine, "lora", "mlp") for engine in ENGINES)  # resumed, stopped early, and in three processes
UNREADABLE = 2 * GLOBAL_BATCH - 1  # images, from the second step on
Runs = dict[str, Ran]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", choose_cases(metafunc.config), ids=lambda case: case.name)


def choose_cases(config: pytest.Config) -> list[Case]:
    """All cases with --full-matrix, otherwise the sample."""
    return ALL if config.getoption("full_matrix") else SAMPLE


def make_stopped_job(name: str, case: Case, engine: str, pictures: Path, folder: Path) -> Job:
    """A run whose validation loss is lowest after its first step: it stops early, and ends with its best weights.

    Without the large epsilon, Adam's first step is the sign of the gradient, also where that is rounding noise.
    """
    options = {"learning_rate": 0.3, "adam_epsilon": 1e-3, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
    recipe = make_recipe(
        case._replace(tuning="full"), pictures, engine, load_best_model_at_end=True, num_train_epochs=3, **options
    )
    stage = recipe.stages["finetune"].model_dump()
    changed = {"validation": [{"path": str(pictures / "captions.json")}], "early_stopping": {"patience": 2}}
    recipe = recipe.model_validate({**recipe.model_dump(), "stages": {"finetune": {**stage, **changed}}})
    return Job(name, recipe, folder / name)


def make_pipeline_job(engines: tuple[str, str], pictures: Path, folder: Path) -> Job:
    """Two stages, each with an engine of its own. DoRA divides by norms of the base weights, which engines shard."""
    case = Case("", "dora", "mlp")
    stages = [make_recipe(case, pictures, engine).stages["finetune"].model_dump() for engine in engines]
    stages[0]["tune"]["llm"] = {"tuning": {"frozen": {}}}
    model = make_recipe(case, pictures, "one").model_dump()
    name = "-then-".join(engines)
    named = dict(zip(("pretrain", "finetune"), stages, strict=True))
    return Job(name, Recipe.model_validate({**model, "stages": named}), folder / name)


def make_unreadable_job(name: str, case: Case, engine: str, damaged: Path, folder: Path) -> Job:
    """A run over images that cannot all be read."""
    content = make_recipe(case, damaged, engine).model_dump()
    content["stages"]["finetune"] |= {"data": [{"path": str(damaged / "captions.json")}], "on_bad_sample": "skip"}
    return Job(name, Recipe.model_validate(content), folder / name)


@pytest.fixture(scope="session")
def mixed(pictures: Path) -> Path:
    """Instructions of which 7 of 24 have no image: in some step, 2 or 3 processes cannot have equally many."""
    samples = json.loads((pictures / "instructions.json").read_text())
    for sample in [sample for sample in samples if "image" in sample][:3]:
        del sample["image"]
        sample["conversations"][0]["value"] = "Say a thing."
    (pictures / "mixed.json").write_text(json.dumps(samples))
    return pictures


@pytest.fixture(scope="session")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of which the second step has no readable image, and the third has one."""
    folder = make_pictures(tmp_path_factory.mktemp("damaged"))
    job = make_unreadable_job("", MORE[0], "one", folder, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLLAVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        setup = stage.prepare_stage(job.recipe, "finetune", empty=True)
    plan = Plan(setup.dataset.lengths, GLOBAL_BATCH, 1, seed=setup.args.data_seed, longest_first=True)
    for number in plan.shuffle(0)[GLOBAL_BATCH : GLOBAL_BATCH + UNREADABLE]:
        image = folder / f"{number}.png"
        image.write_bytes(image.read_bytes()[:500])
    return folder


@pytest.fixture(scope="session")
def one(mixed: Path, damaged: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    """The runs in one process, which the others must equal."""
    folder = tmp_path_factory.mktemp("one")
    cases = {case.reference: case for case in [*choose_cases(request.config), *MORE] if not case.is_refused}
    jobs = [Job(name, make_recipe(case, mixed, "one"), folder / name) for name, case in cases.items()]
    jobs += [make_pipeline_job(("one", "one"), mixed, folder)]
    jobs += [make_stopped_job("stopped", MORE[0], "one", mixed, folder)]
    jobs += [make_unreadable_job("unreadable", MORE[0], "one", damaged, folder)]
    return run_jobs(jobs, 1, folder / "jobs")


@pytest.fixture(scope="session")
def two(
    one: Runs, mixed: Path, damaged: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Runs:
    """All cases in two processes, and one that began in one process."""
    folder = tmp_path_factory.mktemp("two")
    cases = dict.fromkeys([*choose_cases(request.config), *MORE])
    jobs = [Job(case.name, make_recipe(case, mixed), folder / case.name) for case in cases]
    jobs += [make_pipeline_job(engines, mixed, folder) for engines in PIPELINES]
    jobs += [make_stopped_job(f"stopped-{case.engine}", case, case.engine, mixed, folder) for case in MORE]
    jobs += [make_unreadable_job(f"unreadable-{case.engine}", case, case.engine, damaged, folder) for case in MORE]
    begun = interrupt(one[MORE[0].reference].output, folder / "begun")
    jobs += [Job("begun", make_recipe(MORE[0], mixed), begun)]
    return run_jobs(jobs, 2, folder / "jobs")


@pytest.fixture(scope="session")
def three(two: Runs, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Each engine in three processes, and each resumed from a run that began in two.

    DeepSpeed's state is also converted: `universal-CASE`.
    """
    folder = tmp_path_factory.mktemp("three")
    jobs = [Job(case.name, make_recipe(case, mixed), folder / case.name) for case in MORE]
    for case in MORE:
        begun = interrupt(two[case.name].output, folder / f"begun-{case.name}")
        jobs += [Job(begun.name, make_recipe(case, mixed), begun)]
        if case.engine in ("zero2", "zero3"):
            copy = folder / f"universal-{case.name}"
            convert_state(interrupt(two[case.name].output, copy) / "finetune" / f"checkpoint-{SAVED}")
            jobs += [Job(copy.name, make_recipe(case, mixed), copy)]
    return run_jobs(jobs, 3, folder / "jobs")


def convert_state(checkpoint: Path) -> None:
    """Run the command that the refusal names."""
    folder = checkpoint / f"global_step{SAVED}"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(folder), "--output_folder", f"{folder}_universal"]
    done = subprocess.run([*command, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
