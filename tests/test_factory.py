"""The file name is the key: one dropped file is a new part, wherever the package lies."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
import torch, tinyllava
from tinyllava.config import ModelSpec
from tinyllava.data.sample import Sample
from tinyllava.factory import Factory
from tinyllava.model import checkpoint
from tinyllava.model.build import build

assert tinyllava.__file__.startswith({package!r}), tinyllava.__file__
assert "halve" in Factory("connectors").names()
turns = [{{"from": "human", "value": "<image>\\nQ"}}, {{"from": "gpt", "value": "A"}}]
record = {{"id": "a", "image": "a", "conversations": turns}}
spec = ModelSpec.model_validate(tiny_model(connector={{"halve": {{"bias": False}}}}))
model, processor, template = build(spec, lambda: [Sample.from_llava(record)])
assert processor.tokens_per_image == 8 and model.model.multi_modal_projector.linear.bias is None
checkpoint.save(model, processor, template, __import__("pathlib").Path({out!r}))
loaded, again, _, record = checkpoint.load({out!r})
assert again.tokens_per_image == 8 and not record["plain"]
print("adding a connector took one file")
"""


def test_a_connector_is_added_by_dropping_one_file(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "tinyllava", ignore=shutil.ignore_patterns("*.zip", "__pycache__", "fonts"))
    (tmp_path / "tinyllava" / "connectors" / "halve.py").write_text(MINE)
    code = USE.format(tests=str(PACKAGE.parent), package=str(tmp_path), out=str(tmp_path / "out"))
    code = code.replace("sys.path.insert(0,", "sys.path.append(")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "took one file" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("kind", KINDS)
def test_every_listed_part_is_there(kind: str) -> None:
    names = Factory(kind).names()
    assert names and all(Factory(kind).get(name) is not None for name in names)


def test_unknown_names_say_the_nearest() -> None:
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
    Factory("connectors").register("mine", dict)
    assert Factory("connectors").get("mine") is dict and "mine" in Factory("connectors").names()
    Factory("connectors").registered.pop("mine")
