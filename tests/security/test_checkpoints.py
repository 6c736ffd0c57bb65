"""Checkpoints of strangers: they run no code, ask nothing, read no file beside them, and build nothing absurd."""

import ast
import io
import json
import shutil
import struct
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from tests.source_tree import FILES, name_file, parse_file
from tinyllava import checkpoint
from tinyllava.errors import UserError
from tinyllava.files import check_model_files, explain_hub_error
from tinyllava.find import NANO_FOLDER

INDEX = "model.safetensors.index.json"


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A copy of the small model in the package, without its record: as from another package."""
    folder = tmp_path / "model"
    shutil.copytree(NANO_FOLDER / "model", folder)
    (folder / "tinyllava.json").unlink()
    return folder


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_every_load_refuses_code_of_the_checkpoint():
    """`trust_remote_code` is False in each call of transformers' Auto classes: None asks on the terminal."""
    missing = []
    for path in FILES:
        for node in ast.walk(parse_file(path)):
            name = getattr(getattr(node, "func", None), "attr", "")
            if isinstance(node, ast.Call) and name in ("from_pretrained", "load"):
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                owner = getattr(node.func.value, "id", "")
                is_torch = owner == "torch" and not getattr(given.get("weights_only"), "value", None)
                is_auto = owner.startswith(("Auto", "LlavaProcessor")) and "trust_remote_code" not in given
                if is_torch or (is_auto and None not in given):  # **where: checked by the next test
                    missing.append((name_file(path), node.lineno))
    assert missing == []


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"]
)
def test_code_in_a_checkpoint_never_runs_and_nothing_is_asked(nano, file, monkeypatch, capsys):
    """Text on stdin once counted as consent to run the code."""
    (nano / "evil.py").write_text(f"from pathlib import Path\nPath({str(nano / 'ran')!r}).touch()\nclass Evil: pass\n")
    classes = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    auto_map = {name: "evil.Evil" for name in classes} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    if not (nano / file).exists():
        (nano / file).write_text("{}")
    edit(nano / file, auto_map=auto_map)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with suppress(UserError):
        checkpoint.load(nano, template="phi")
    assert not (nano / "ran").exists() and sys.stdin.tell() == 0
    assert "[y/N]" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/../../x", "..\\x", "sub/x.safetensors", ".."]
)
def test_an_index_names_only_files_beside_it(nano, name):
    content = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": name}}
    (nano / INDEX).write_text(json.dumps(content))
    with pytest.raises(UserError, match="not a file beside it"):
        check_model_files(nano)
    with pytest.raises(UserError, match="not a file beside it"):
        checkpoint.load(nano, template="phi")


@pytest.mark.parametrize("header", [50_000_000, 2**40, 2**64 - 1])
def test_a_weight_file_with_a_huge_header_is_refused(nano, header):
    (nano / "model.safetensors").write_bytes(struct.pack("<Q", header) + b"{" + b" " * 1000)
    with pytest.raises(UserError, match="announces a header"):
        check_model_files(nano)


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers"])
def test_a_config_of_a_million_layers_is_refused(nano, name):
    config = json.loads((nano / "config.json").read_text())
    edit(nano / "config.json", text_config=config["text_config"] | {name: 1_000_000})
    with pytest.raises(UserError, match=r"asks for 1,000,000 layers"):
        checkpoint.load(nano, template="phi")


def test_a_json_file_of_gigabytes_is_not_read(nano):
    with (nano / "tokenizer.json").open("r+b") as file:
        file.truncate(2**32)  # sparse
    with pytest.raises(UserError, match="more than 200 MB"):
        check_model_files(nano)


def make_hub_error(kind: type, status: int) -> Exception:
    error = kind.__new__(kind)
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (make_hub_error(errors.GatedRepoError, 403), "ask for your consent.*hf auth login"),
        (make_hub_error(errors.RepositoryNotFoundError, 401), "or it is private: then run `hf auth login`"),
        (make_hub_error(errors.RepositoryNotFoundError, 404), "neither a directory nor on the Hub$"),
        (make_hub_error(errors.RevisionNotFoundError, 404), "not this revision"),
        (make_hub_error(errors.HfHubHTTPError, 503), "the Hub answered 503"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (None, "nor readable from the Hub: strange things"),
    ],
)
def test_each_error_of_the_hub_says_what_it_is(cause, expected):
    error = OSError("strange things. More of them")
    error.__cause__ = cause
    with pytest.raises(UserError, match=expected):
        raise UserError(explain_hub_error(error))


def test_a_model_with_code_says_so():
    text = "The repository x contains custom code which must be executed. Please pass `trust_remote_code=True`."
    assert "contains custom code (`auto_map`)" in explain_hub_error(ValueError(text))
