"""Every recipe of the package: its comment, `tinyllava look`, and two steps of each stage with stand-ins."""

import inspect
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from tests.cli_tools import CommandResult, run_command_line  # noqa: F401
from tinyllava.checkpoint import legacy
from tinyllava.commands.look import look_at_recipe
from tinyllava.commands.stand_ins import TOWER_SIZES, make_stand_ins
from tinyllava.config import Recipe, load_recipe
from tinyllava.config.schema import MissingValues
from tinyllava.errors import UserError
from tinyllava.factory import Factory
from tinyllava.train import stage

NAMES = Factory("recipes").list_names()
SCORES = ("VQAv2", "GQA", "SQA-I", "TextVQA", "MM-Vet", "POPE", "MME", "MMMU-val")
ROW = r"\| `([^`]+)` \| [^|]+ \| [^|]+ \| (\d.*) \|"
PUBLISHED = {  # the rows of the published table: first and last score
    "openelm-450m-clip-base": (69.5, 23.9),
    "openelm-450m-siglip-base": (71.7, 24.0),
    "qwen2-0.5b-siglip-base": (72.3, 29.7),
    "qwen2.5-0.5b-siglip-base": (75.3, 33.3),
    "qwen2.5-3b-siglip-base": (79.4, 39.9),
    "tinyllama-clip-base": (73.7, 27.9),
    "tinyllama-siglip-base": (75.5, 28.3),
    "stablelm2-clip-base": (75.9, 31.8),
    "stablelm2-siglip-base": (78.2, 32.6),
    "gemma-2b-siglip-base": (78.4, 31.7),
    "phi2-clip-base": (76.8, 36.3),
    "phi2-siglip-base": (79.2, 38.2),
    "phi2-siglip-lora": (77.6, 35.6),
    "phi2-siglip-share": (80.1, 38.4),
}


def comment(name: str) -> str:
    """The comment at the beginning of a recipe's file."""
    lines = Factory("recipes").find_path(name).read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(at for at, line in enumerate(lines) if not line.startswith("#"))])


def two_steps(name: str) -> Recipe:
    """The recipe with two steps per stage, and with data that do not exist."""
    recipe = load_recipe(name)
    trainer = {"max_steps": 2, "per_device_train_batch_size": 2, "dataloader_num_workers": 0, "report_to": "none"}
    changes = ["data=[{path: nowhere.json}]", "validation=null", "global_batch_size=2"]
    changes += [f"trainer.{key}={value}" for key, value in {**trainer, "save_strategy": "no"}.items()]
    return load_recipe(name, [f"stages.{stage}.{change}" for stage in recipe.stages for change in changes])


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_looked_at_and_trains_two_steps_of_each_stage(name: str, tmp_path: Path) -> None:
    recipe, result = make_stand_ins(two_steps(name), tmp_path / "stand-ins")
    assert "nowhere.json: 12 made-up records" in result
    shown = Console(file=io.StringIO(), width=100)
    look_at_recipe(recipe, shown)
    final = stage.run(recipe, name, tmp_path / "run")
    for trained in recipe.stages:
        assert f"stage {trained}" in shown.file.getvalue()
        lines = (tmp_path / "run" / trained / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert last["step"] == 2 and 0 < last["train_loss"] < 20
    assert (final / "model.safetensors.index.json").is_file()


def test_look_lists_the_stand_ins(tinyllava, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    result: CommandResult = tinyllava("look", "tinyllama-mof", "--offline")
    assert result.code == 0, result.err
    assert "LLM TinyLlama/TinyLlama-1.1B-Chat-v1.0: random llama of 2 layers" in result.out
    assert "vision tower facebook/dinov2-large: random dinov2 of 3 layers" in result.out
    tokens = 2 * (TOWER_SIZES["image_size"] // TOWER_SIZES["patch_size"]) ** 2  # of both towers, interleaved
    assert f"<image x {tokens}>" in result.out and "stage finetune" in result.out and "ASSISTANT: red</s>" in result.out
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_not_replaced(tmp_path: Path) -> None:
    assert make_stand_ins(load_recipe("quickstart"), tmp_path) == (load_recipe("quickstart"), [])


def test_a_part_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe("phi2-siglip-base", ["model.llm=someone/unheard-of-1b"])
    with pytest.raises(UserError, match=r"no stand-in is known for the LLM 'someone/unheard-of-1b'.*\n?.*--offline"):
        make_stand_ins(recipe, tmp_path)


def test_stand_ins_have_enough_layers_for_partial_tuning(tmp_path: Path) -> None:
    recipe = load_recipe("phi2-siglip-share", ["stages.share.tune.vision_tower={partial: {last: 14}}"])
    made, _ = make_stand_ins(recipe, tmp_path)
    assert (
        made.model.vision_tower.config["num_hidden_layers"] == 16
    )  # 14 below the layer that feature layer -2 leaves out


def test_every_row_of_the_published_table_has_its_recipe() -> None:
    for name, (vqav2, mmmu) in PUBLISHED.items():
        text = comment(name)
        scores = {key: float(value) for key, value in re.findall(r"([A-Za-z0-9-]+) (\d+\.\d)(?=\s)", text + "\n")}
        assert set(SCORES) <= set(scores), name
        assert (scores["VQAv2"], scores["MMMU-val"]) == (vqav2, mmmu), name
        recipe = load_recipe(name)
        sizes = [one.global_batch_size for one in recipe.stages.values()]
        assert sizes == ([256, 256, 128] if name == "phi2-siglip-share" else [256, 128])
        assert recipe.model.vision_tower.name.split("/")[1].split("-")[0] == ("clip" if "clip" in name else "siglip")
        assert recipe.stages["pretrain"].template == "pretrain" and "row       " in text


def test_the_page_has_the_scores_that_the_recipes_have() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = {row[0]: [float(cell) for cell in row[1].split(" | ")] for row in re.findall(ROW, page)}
    assert set(rows) == set(PUBLISHED)
    for name, scores in rows.items():
        result = re.search(r"^# expected  (.*)$", comment(name), re.MULTILINE)[1].split()
        assert scores == [float(word) for word in result[1::2]] and result[::2] == list(SCORES), name


def test_a_stage_may_come_between_inherited_ones() -> None:
    base, share = load_recipe("phi2-siglip-base"), load_recipe("phi2-siglip-share")
    assert list(share.stages) == ["pretrain", "share", "finetune"]
    assert share.stages["pretrain"] == base.stages["pretrain"]
    assert share.stages["finetune"].trainer == base.stages["finetune"].trainer


def test_data_lie_under_the_folder_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    (here,) = load_recipe("phi2-siglip-base").stages["pretrain"].data
    assert here.path == "data/text_files/blip_laion_cc_sbu_558k.json"
    assert here.images == "data/llava/llava_pretrain/images"
    monkeypatch.setenv("TINYLLAVA_DATA", "/somewhere")
    (there,) = load_recipe("phi2-siglip-base").stages["pretrain"].data
    assert there.path == "/somewhere/text_files/blip_laion_cc_sbu_558k.json"


def test_what_an_original_checkpoint_lacks_is_named_as_its_loader_names_it() -> None:
    assert list(MissingValues.model_fields) == list(inspect.signature(legacy.read_legacy).parameters)[1:]


def test_a_recipe_gives_the_loader_what_a_checkpoint_of_the_original_lacks(tmp_path: Path) -> None:
    folder = Path(__file__).parent / "parity" / "legacy_checkpoints" / "full_tinyllama_mof_mofmlp"
    facts = json.loads((folder / "expected.json").read_text())
    changes = [f"model.checkpoint={folder / 'checkpoint'}"]
    recipe, _ = make_stand_ins(load_recipe("custom-finetune", changes), tmp_path / "data")
    with pytest.raises(UserError, match="the config of its DINOv2 is missing"):
        stage.prepare_stage(recipe, "finetune")
    lacking = {"template": "llama", **{key: facts[key] for key in ("dinov2_config", "image_processor")}}
    recipe, _ = make_stand_ins(
        load_recipe("custom-finetune", [*changes, f"model.lacking={lacking}"]), tmp_path / "more"
    )
    setup = stage.prepare_stage(recipe, "finetune")
    assert setup.vlm.model.config.vision_config.second.model_type == "dinov2"
    assert setup.vlm.template.name == "llama"
