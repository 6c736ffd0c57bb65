"""Follow the pages docs/add-your-own-*.md outside the package: write their files, run their commands and Python."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from tests.cli_tools import CommandResult, run_command_line  # noqa: F401 (the fixture `tinyllava`)
from tests.conftest import CLIP, tiny_model
from tests.tiny_session import corpus
from tests.tiny_vlm import build_tiny
from tinyllava import checkpoint
from tinyllava.config import load_recipe
from tinyllava.errors import UserError
from tinyllava.factory import TRUST, Factory
from tinyllava.stamps import prepare_tier

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("add-your-own-*.md"))
FENCE = "`" * 3
NAME = re.compile(r"^(?:#|\{#-) (\S+\.(?:py|yaml|jinja))\b")
PARTS = {"pretrain": "captions", "finetune": "instructions"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    return re.findall(rf"^{FENCE}(\w+)\n(.*?)^{FENCE}", page.read_text(encoding="utf-8"), flags=re.S | re.M)


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tier(tmp_path_factory.mktemp("stamps"), "tiny", scale=0.005)


@pytest.fixture
def desk(tmp_path: Path, stamps: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's directory: nothing in it is part of a package or on the import path."""
    (tmp_path / "my_data.json").write_text((stamps / "instructions.json").read_text())
    (tmp_path / "my_pictures").symlink_to(stamps, target_is_directory=True)
    Image.new("RGB", (80, 60), "green").save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]
    for factory in (Factory(kind) for kind in ("llms", "vision_towers")):
        factory.registered.clear()


def shortened(command: list[str], stamps: Path) -> list[str]:
    """Change a command to two steps per stage on little data, with tiny parts in place of the quickstart's."""
    if command[0] not in ("look", "train"):
        return command
    own = load_recipe(command[1]).model
    command = [*command, "eval=[]", "stages.finetune.validation=null"]
    tiny = {"llm": own.llm, "vision_tower": own.vision_tower}
    command += [f"model.{part}={json.dumps(tiny_model()[part])}" for part, spec in tiny.items() if spec.config is None]
    if not command[1].startswith("my-data"):
        command += [f"stages.{stage}.data=[{{path: {stamps}/{part}.json}}]" for stage, part in PARTS.items()]
    else:
        command += [f"stages.pretrain.data=[{{path: {stamps}/captions.json}}]"]
    for stage in PARTS:
        command += [f"stages.{stage}.trainer.{key}" for key in ("max_steps=2", "dataloader_num_workers=0")]
        command += [f"stages.{stage}.global_batch_size=4"]
    return command


def trusting(line: str) -> tuple[str | None, list[str]]:
    """The module that a command line trusts, and the words after `tinyllava`."""
    words = shlex.split(line, comments=True)
    trust = words.pop(0).removeprefix(f"{TRUST}=") if words[0].startswith(TRUST) else None
    assert words[0] == "tinyllava", line
    return trust, words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem.removeprefix("add-your-own-"))
def test_the_page_does_what_it_says(
    page: Path, desk: Path, stamps: Path, tinyllava: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    for language, text in blocks(page):
        if named := NAME.match(text):
            (desk / named[1]).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, str(page), "exec"), {})
        else:
            for line in filter(None, text.splitlines()):
                trust, words = trusting(line)
                with monkeypatch.context() as environment:
                    if trust:
                        environment.setenv(TRUST, trust)
                    result = tinyllava(*shortened(words, stamps), stdin="What is this?\n")
                assert result.code == 0, f"{line}\n{result.out[-2000:]}\n{result.err[-3000:]}"
                if words[0] == "train":
                    trained.append(words[1].removesuffix(".yaml"))
    assert trained
    for name in trained:
        assert_trained(desk / "runs" / name, page)


def assert_trained(run: Path, page: Path) -> None:
    """Check that both stages changed the weights, and that the last checkpoint can be loaded."""
    vlm = checkpoint.load(run / "finetune" / "final")
    model, processor = vlm.model, vlm.processor
    before = checkpoint.load(run / "pretrain" / "final").model
    later, earlier = dict(model.named_parameters()), dict(before.named_parameters())
    assert any(not torch.equal(later[name], earlier[name]) for name in earlier if name in later)
    pixels = processor.to_pixels([Image.open("cat.png")])
    with torch.no_grad():
        tokens = model.model.get_image_features(pixels).pooler_output[0]
    assert tokens.shape == (processor.tokens_per_image, model.config.text_config.hidden_size)


def written(page: str, name: str) -> None:
    """Write a file of the page into the directory."""
    texts = [text for _, text in blocks(ROOT / "docs" / f"add-your-own-{page}.md")]
    (text,) = (text for text in texts if (named := NAME.match(text)) and named[1] == name)
    Path(name).write_text(text, encoding="utf-8")


def saved(folder: Path, **model: object) -> Path:
    checkpoint.save(build_tiny(tiny_model(**model), corpus()), folder)
    return folder


TOWER = {"family": "my_tower:VisionTower", "config": {"model_type": "my_tower", "image_size": 32, "patch_size": 8}}
FOREIGN = {"connector": {"connector": "my_connector:Connector"}, "vision tower": {"vision_tower": TOWER}}


@pytest.mark.parametrize("part", FOREIGN)
def test_a_checkpoint_that_names_code_loads_only_when_it_is_trusted(
    part: str, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"my_{part.split()[-1]}"
    written(part.replace(" ", "-"), f"{module}.py")
    folder = saved(desk / "checkpoint", **FOREIGN[part])
    del sys.modules[module]  # as in another process
    Factory("vision_towers").registered.clear()
    for load in (checkpoint.load, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(UserError) as error:
            load(folder)
        assert f"the checkpoint's {part} is code outside this package, {module}:" in str(error.value)
        assert f"`import {module}` before you load, or set {TRUST}={module}." in str(error.value)
        assert module not in sys.modules and len(str(error.value).splitlines()) == 2
    with monkeypatch.context() as environment:
        environment.setenv(TRUST, f"another,{module}")
        checkpoint.load(folder)
    del sys.modules[module]
    monkeypatch.syspath_prepend(desk)
    importlib.import_module(module)
    checkpoint.load(folder)


def test_a_tower_that_transformers_has_needs_no_file_to_be_loaded(desk: Path) -> None:
    written("vision-tower", "my_vit.py")
    vit = {"model_type": "vit", **{key: CLIP[key] for key in CLIP if key != "model_type"}}
    folder = saved(desk / "checkpoint", vision_tower={"family": "my_vit:VisionTower", "config": vit})
    Path("my_vit.py").unlink()
    del sys.modules["my_vit"]
    Factory("vision_towers").registered.clear()
    vlm = checkpoint.load(folder)
    ours, processor = vlm.model, vlm.processor
    ids = torch.full((1, processor.tokens_per_image), ours.config.image_token_id)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad():
        theirs = LlavaForConditionalGeneration.from_pretrained(folder).eval()(**inputs).logits
        torch.testing.assert_close(ours(**inputs).logits, theirs, rtol=0, atol=1e-6)


def test_what_a_notebook_registers_works_under_its_name(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(nn.Module):
        def __init__(self, vision_dim: int, text_dim: int):
            super().__init__()
            self.linear = nn.Linear(vision_dim, text_dim)

        def num_tokens(self, patches: int) -> int:
            return patches

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.linear(features)

    connectors = Factory("connectors")
    monkeypatch.setattr(connectors, "registered", {"mine": Mine})
    folder = saved(desk / "checkpoint", connector="mine")
    assert type(checkpoint.load(folder).model.model.multi_modal_projector) is Mine
    connectors.registered.clear()
    with pytest.raises(UserError, match=r"unknown connector 'mine'.*Known: identity, linear"):
        checkpoint.load(folder)


def test_the_error_for_an_unknown_tower_says_how_to_register_it(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a separate process, because classes cannot be removed from the Auto classes again."""
    written("vision-tower", "my_tower.py")
    monkeypatch.syspath_prepend(desk)
    Factory("vision_towers").register("my_tower", importlib.import_module("my_tower").VisionTower)
    saved(desk / "checkpoint", vision_tower={"config": TOWER["config"]})
    code = "import tinyllava; tinyllava.load('checkpoint')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=desk, capture_output=True, text=True, env=environment)
    assert "UserError: cannot read checkpoint" in done.stderr, done.stderr[-2000:]
    assert "my_tower. If the part is yours, import the module that registers it first." in done.stderr


def test_wrong_own_code_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot load vision tower 'nothing_here:X': No module named"):
        build_tiny(tiny_model(vision_tower={**TOWER, "family": "nothing_here:X"}))
    with pytest.raises(
        UserError, match=r"connector math:sqrt is <built-in function sqrt>, expected a subclass of torch\.nn\.Module"
    ):
        build_tiny(tiny_model(connector="math:sqrt"))
