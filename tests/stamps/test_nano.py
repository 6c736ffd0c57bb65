"""The parts and the model `nano` of the package: ordinary parts, not trained on held-out data."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import tinyllava
from tests.cli_tools import run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tests.conftest import tiny_model
from tinyllava.config import ModelSpec
from tinyllava.data.sample import Sample
from tinyllava.errors import UserError
from tinyllava.eval.benchmarks.custom import normalize
from tinyllava.find import NANO_FOLDER
from tinyllava.infer import Session, find_checkpoint
from tinyllava.model.build import build
from tinyllava.stamps import get_tier
from tinyllava.stamps.compose import draw_scene
from tinyllava.stamps.plan import plan_records
from tinyllava.stamps.words import FONTS, HELD_OUT, HELD_OUT_FONTS, list_words
from tinyllava.stamps.write import VERSION, describe_tier

ROOT = Path(__file__).parents[2]
MB = 1_000_000
TIERS = {"vision_tower": "pretrain", "llm": "pretrain", "model": "full"}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def manifest(part: str) -> dict:
    return json.loads((NANO_FOLDER / part / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def nano() -> Session:
    return Session.load("nano", device="cpu")


def test_they_are_ordinary_parts_and_small_ones() -> None:
    tower = AutoModel.from_pretrained(NANO_FOLDER / "vision_tower")
    llm = AutoModelForCausalLM.from_pretrained(NANO_FOLDER / "llm")
    assert type(tower).__name__ == "SiglipVisionModel" and type(llm).__name__ == "LlamaForCausalLM"
    assert 2 * MB < tower.num_parameters() < 5 * MB and 2 * MB < llm.num_parameters() < 5 * MB
    assert size(NANO_FOLDER / "vision_tower") + size(NANO_FOLDER / "llm") < 12 * MB and size(NANO_FOLDER) < 25 * MB


def test_a_recipe_loads_them_by_name_unchanged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()  # a folder of that name is ./nano
    spec = tiny_model(llm={}, vision_tower={"name": "nano", "feature_layer": -1}, template="plain", dtype="float32")
    vlm = build(ModelSpec.model_validate({**spec, "llm": "nano"}))
    stored = AutoModel.from_pretrained(NANO_FOLDER / "vision_tower", dtype=torch.float32).state_dict()
    for name, weight in vlm.model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, stored[name])
    tokenizer = AutoTokenizer.from_pretrained(NANO_FOLDER / "llm")
    assert vlm.processor.tokenizer.encode("a red balloon") == tokenizer.encode("a red balloon")
    assert find_checkpoint("nano") == NANO_FOLDER / "model"


def test_a_folder_of_that_name_is_never_used_instead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tinyllava
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("./nano", Path("nano")):
        with pytest.raises(UserError, match="nano is not a directory"):
            find_checkpoint(folder)
    result = tinyllava("eval", "./nano", "--tasks", "stamps")
    assert result.code == 2 and "nano is not a directory" in result.err and not (tmp_path / "nano").exists()


@pytest.mark.parametrize("part", TIERS)
def test_nothing_held_out_was_in_what_they_were_trained_on(part: str) -> None:
    """The manifest lists the training data, and the tier has the same data today."""
    stored, now = manifest(part), get_tier(TIERS[part])
    assert {key: stored[key] for key in describe_tier(now)} == describe_tier(now) and stored["version"] == VERSION
    held = stored["held_out"]
    assert not set(stored["concepts"]) & set(held["concepts"])
    for smaller in ("small", "full"):
        assert set(get_tier(smaller).held_out) <= set(held["concepts"])
    assert set(held["words"]) == set(list_words(HELD_OUT)) and set(held["fonts"]) == set(HELD_OUT_FONTS)
    assert not set(FONTS) & set(held["fonts"])


def test_the_model_was_trained_on_no_other_data() -> None:
    record = json.loads((NANO_FOLDER / "model" / "tinyllava.json").read_text(encoding="utf-8"))
    assert {source["path"] for source in record["run"]["data"]} == {"stamps:reading/words", "stamps:full/instructions"}
    paths = set(re.findall(r"path: (\S+)", record["run"]["recipe_yaml"]))
    assert {path.partition("/")[0] for path in paths} == {"stamps:full", "stamps:reading"}
    # The manifest of the model is about `full`; `reading` shows the same.
    assert describe_tier(get_tier("reading")) == {**describe_tier(get_tier("full")), "tier": "reading"}


def test_the_vocabulary_has_no_entry_for_a_held_out_name() -> None:
    """The tokenizer's merges come from the texts that it was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(NANO_FOLDER / "llm")
    shown = {word for name in get_tier("pretrain").concepts for word in name.split()}
    alone = [name for name in get_tier("full").held_out if " " not in name and name not in shown]
    assert len(alone) > 30 and all(len(tokenizer.tokenize(f" {name}")) > 1 for name in alone)
    assert sum(len(tokenizer.tokenize(f" {word}")) == 1 for word in shown) > 0.95 * len(shown)


def measure_accuracy(session: Session, category: str, count: int) -> float:
    """The share of right answers to the first questions of a category of the full test."""
    asked = [p for p in plan_records(get_tier("full"), 0, "test", count) if p.record["category"] == category]
    samples = [
        Sample.from_llava({"image": draw_scene(p.scene), "conversations": turns(p.record["text"])}) for p in asked
    ]
    answers = session.generate(samples, max_new_tokens=16)
    return sum(normalize(a) == normalize(p.record["answer"]) for a, p in zip(answers, asked, strict=True)) / count


def turns(text: str) -> list[dict]:
    return [{"from": "human", "value": f"<image>\n{text}"}]


@pytest.mark.parametrize(
    ("category", "least"),
    [("naming", 0.8), ("background_colour", 0.9), ("existence", 0.85), ("multiple_choice", 0.8), ("reading", 0.35)],
)
def test_it_answers(nano: Session, category: str, least: float) -> None:
    """The scores are far above those without the image (naming 0). docs/nano.md has the exact figures."""
    assert measure_accuracy(nano, category, 40) >= least


def test_it_chats_about_an_image(nano: Session, tinyllava) -> None:
    nano.reset()
    picture = ROOT / "docs" / "stamps.png"
    assert nano.chat("What colour is the background?", str(picture)) == "yellow"
    nano.reset()
    assert nano.chat("Is there an elephant in the picture?", str(picture)) == "yes"
    result = tinyllava("chat", "nano", picture, "--prompt", "What colour is the balloon?")
    assert result.code == 0 and result.out.strip() == "red"


def test_transformers_loads_it_as_it_is() -> None:
    model = AutoModelForImageTextToText.from_pretrained(NANO_FOLDER / "model")
    assert type(model).__name__ == "LlavaForConditionalGeneration" and tinyllava.__version__
