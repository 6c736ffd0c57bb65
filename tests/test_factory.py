"""The file name is the key: one new file is a new part, wherever the package is installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CLIP, DINOV2, tiny_model
from tests.tiny_vlm import build_tiny
from tinyllava import checkpoint
from tinyllava.commands.split import write_llm
from tinyllava.errors import UserError
from tinyllava.factory import KINDS, Factory

PACKAGE = Path(__file__).parents[1] / "tinyllava"
MINE = '''"""`halve`: every second patch, then one linear layer."""

from torch import nn


class Connector(nn.Module):
    def __init__(self, vision_dim, text_dim, bias=True):
        super().__init__()
        self.linear = nn.Linear(vision_dim, text_dim, bias=bias)

    def num_tokens(self, patches):
        return (patches + 1) // 2

    def forward(self, features):
        return self.linear(features[:, ::2])
'''
USE = """
import sys
sys.path.insert(0, {tests!r})
from tests.conftest import tiny_model
from tests.tiny_vlm import build_tiny
import tinyllava
from tinyllava.factory import Factory
from tinyllava import checkpoint

assert tinyllava.__file__.startswith({package!r}), tinyllava.__file__
assert "halve" in Factory("connectors").list_names()
vlm = build_tiny(tiny_model(connector={{"halve": {{"bias": False}}}}))
assert vlm.processor.tokens_per_image == 8 and vlm.model.model.multi_modal_projector.linear.bias is None
checkpoint.save(vlm, __import__("pathlib").Path({out!r}))
loaded = checkpoint.load({out!r})
assert loaded.processor.tokens_per_image == 8 and not loaded.record["plain"]
print("adding a connector took one file")
"""


def test_a_connector_is_added_by_dropping_one_file(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "tinyllava", ignore=shutil.ignore_patterns("*.zip", "__pycache__", "fonts"))
    (tmp_path / "tinyllava" / "connectors" / "halve.py").write_text(MINE)
    code = USE.format(tests=str(PACKAGE.parent), package=str(tmp_path), out=str(tmp_path / "out"))
    code = code.replace("sys.path.insert(0,", "sys.path.append(")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "took one file" in done.stdout, done.stderr[-2000:]


OPENELM = {"model_type": "openelm", "model_dim": 32, "head_dim": 8, "num_transformer_layers": 2, "ffn_dim_divisor": 16}
LOAD = """
import os, sys
from pathlib import Path
from transformers import AutoModelForImageTextToText
import tinyllava.model.modeling
from tinyllava.config import LLMSpec, VisionTowerSpec
from tinyllava.model.parts import read_part_config

PARTS = ("llms", "vision_towers", "connectors", "templates", "tuning")

def list_imported():
    return sorted(name for name in sys.modules if name.startswith(tuple(f"tinyllava.{part}." for part in PARTS)))

def load(what, folder):
    if what == "auto":
        model = AutoModelForImageTextToText.from_pretrained(folder).model
        names = type(model.language_model).__name__, type(model.vision_tower).__name__
        assert names == ("OpenELMModel", "Mof"), names
    elif what == "checkpoint":
        from tinyllava import checkpoint
        assert checkpoint.load(folder).model.config.text_config.model_type == "openelm"
    elif what == "llm":
        assert read_part_config("llm", LLMSpec(name=folder)).model_type == "openelm"
    else:
        assert read_part_config("vision_tower", VisionTowerSpec(name=folder)).model_type == "mof"

assert list_imported() == [], list_imported()
for what, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    if not (child := os.fork()):  # each loads in a process in which no part was imported before
        load(what, folder)
        print(what, *list_imported(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, what
"""


@pytest.fixture(scope="module")
def own_classes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint with an LLM and a vision tower that transformers does not have, and a directory for each."""
    folder = tmp_path_factory.mktemp("own_classes")
    vlm = build_tiny(tiny_model(llm=OPENELM, tower={"model_type": "mof", "first": CLIP, "second": DINOV2}))
    checkpoint.save(vlm, folder / "whole")
    vlm.model.model.vision_tower.save_pretrained(folder / "vision_tower")
    write_llm(vlm.model, folder / "llm")
    whole = dict.fromkeys(("auto", "checkpoint"), folder / "whole")
    return {**whole, "llm": folder / "llm", "vision_tower": folder / "vision_tower"}


def test_a_file_is_imported_when_a_config_names_it_and_not_before(own_classes: dict[str, Path]) -> None:
    """The package's files for OpenELM and for mixtures register classes that transformers does not have."""
    arguments = [str(each) for pair in own_classes.items() for each in pair]
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert set(imported) == {"auto", "checkpoint", "llm", "vision_tower"}
    for what, modules in imported.items():
        assert ("tinyllava.llms.openelm" in modules) == (what != "vision_tower"), what
        assert ("tinyllava.vision_towers.mof" in modules) == (what != "llm"), what
        assert "tinyllava.llms.phi" not in modules, what


@pytest.mark.parametrize("kind", KINDS)
def test_every_listed_part_is_there(kind: str) -> None:
    names = Factory(kind).list_names()
    assert names and all(Factory(kind).get(name) is not None for name in names)


def test_errors_for_unknown_names_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown connector 'liner'; did you mean 'linear'\?.*identity, linear, mlp"):
        Factory("connectors").get("liner")
    with pytest.raises(UserError, match=r"unknown kind of part .connector.; did you mean .connectors."):
        Factory("connector")


def test_short_names_options_and_own_code() -> None:
    part, options = Factory("connectors").resolve("mlp3x_silu", {})
    assert part is Factory("connectors").get("mlp") and options == {"layers": 3, "act": "silu"}
    with pytest.raises(UserError, match="unknown connector 'mlp2x_tanhh'"):
        Factory("connectors").resolve("mlp2x_tanhh", {})
    assert Factory("connectors").get("collections:OrderedDict").__name__ == "OrderedDict"
    with pytest.raises(UserError, match=r"cannot load connector 'nothing\.here:X'"):
        Factory("connectors").get("nothing.here:X")
    for address in (":", ".a:b", "a:", "a.:b", "os.path:", "a\0b:c", "\ud83d:c"):
        with pytest.raises(UserError, match=r"not the address of Python code. Expected package\.module:Name"):
            Factory("connectors").get(address)
    with pytest.raises(UserError, match="unknown connector 'xxx"):
        Factory("connectors").get("x" * 300)  # no file can have this name
    Factory("connectors").register("mine", dict)
    assert Factory("connectors").get("mine") is dict and "mine" in Factory("connectors").list_names()
    Factory("connectors").registered.pop("mine")
