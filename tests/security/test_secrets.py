"""Tokens, keys and passwords stand in no record, no model card, no log and no error. Such a run still resumes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.tiny_run import recipe as tiny_recipe
from tinyllava import checkpoint
from tinyllava.commands.card import make_model_card
from tinyllava.config import Recipe, load_recipe
from tinyllava.config.read import parse_recipe
from tinyllava.data.references import shorten
from tinyllava.find import NANO_FOLDER
from tinyllava.secrets import HIDDEN, hide_secrets, is_secret_name, mask_settings
from tinyllava.train import stage
from tinyllava.train.record import RunRecord

TOKEN = "hf_" + "Ab1" * 11
SECRET_NAMES = """
token hub_token HF_TOKEN api_key apikey OPENAI_API_KEY password Authorization X-Amz-Signature aws_secret_access_key
client-secret auth_token private_key secret_thing credentials
"""
ORDINARY_NAMES = """
eos_token pad_token image_token add_tokens tokenizer max_new_tokens num_key_value_heads key_mapping monkey trainer
pad_token_id keys passive authors
"""


def test_names_of_secrets():
    assert [name for name in SECRET_NAMES.split() if not is_secret_name(name)] == []
    assert [name for name in ORDINARY_NAMES.split() if is_secret_name(name)] == []


@pytest.mark.parametrize(
    "text",
    [
        f"401 for {TOKEN}.",
        "https://me:hunter22@example.org/a.png",
        "https://example.org/a.png?size=2&token=hunter22",
        "https://example.org/?X-Amz-Signature=hunter22&x=1",
        '{"api_key": "hunter22", "n": 1}',
        "headers {'Authorization': 'Bearer hunter22hunter22'}",
        "Authorization: Basic hunter22",
        "hub_token: hunter22",
        "WANDB_API_KEY=hunter22",
        "sk-proj-hunter22hunter22hunter22",
        "cannot reach hunter22-of-the-environment here",
    ],
)
def test_secrets_in_texts(text, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "hunter22-of-the-environment")
    assert "hunter22" not in hide_secrets(text) and TOKEN not in hide_secrets(text)
    assert HIDDEN in hide_secrets(text)
    assert "hunter22" not in shorten(f"https://x.org/ {text}") and TOKEN not in shorten(f"https://x.org/ {text}")


@pytest.mark.parametrize(
    "text",
    [
        "template 'phi' ends turns with the EOS token, but this tokenizer has none. Give it one.",
        "12:30:44 stage finetune: learning_rate=0.001, pad_token=<pad>, seed=1",
        "see https://example.org/a.png?size=2&page=3#part and file:///data/1.jpg, me@example.org",
        "the key: value pairs of special tokens; token: <image>",
        "false true 1 /root",
    ],
)
def test_ordinary_texts_stay(text, monkeypatch):
    for name, value in {"TOKENIZERS_PARALLELISM": "false", "HF_TOKEN_PATH": "/root", "DISABLE_TOKEN": "1"}.items():
        monkeypatch.setenv(name, value)
    assert hide_secrets(text) == text


def test_settings_name_the_variable_of_a_secret(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter22-long")
    monkeypatch.setenv("PLAIN", "hunter33")
    settings = {
        "run_name": "hunter22-long",
        "a": [{"api_key": "hunter33"}],
        "b": {"password": "x"},
        "seed": 3,
        "c": None,
    }
    masked = mask_settings(settings)
    assert masked["run_name"] == "${oc.env:MY_TOKEN}" and masked["a"] == [{"api_key": "${oc.env:PLAIN}"}]
    assert masked["b"] == {"password": HIDDEN} and masked["seed"] == 3 and masked["c"] is None
    assert mask_settings(masked) == masked


@pytest.fixture
def secret_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that reads a secret, and a path that is none, from the environment."""
    monkeypatch.setenv("SERVICE_TOKEN", "hunter22-long")
    monkeypatch.setenv("PICTURES", str(pictures))
    content = yaml.safe_load(tiny_recipe(pictures, stages=("finetune",), max_steps=2).to_yaml())
    content["stages"]["finetune"]["data"][0]["path"] = "${oc.env:PICTURES}/instructions.json"
    content["stages"]["finetune"]["trainer"]["run_name"] = "${oc.env:SERVICE_TOKEN}"
    content["stages"]["finetune"]["trainer"]["project"] = f"of {TOKEN}"
    path = tmp_path / "secret.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_written_recipe_can_be_run_again_without_the_secret_in_it(secret_recipe, monkeypatch, tmp_path):
    recipe = load_recipe(str(secret_recipe))
    text = recipe.to_yaml()
    assert "hunter22" not in text and TOKEN not in text
    assert "${oc.env:SERVICE_TOKEN}" in text
    (tmp_path / "again.yaml").write_text(text)
    again = load_recipe(str(tmp_path / "again.yaml"))
    assert again.stages["finetune"].trainer["run_name"] == "hunter22-long"
    assert again.stages["finetune"].data == recipe.stages["finetune"].data  # no secret: its value decides
    monkeypatch.delenv("SERVICE_TOKEN")
    assert isinstance(parse_recipe(text, "of the record"), Recipe)  # on a machine without the secret


def test_a_run_leaves_no_secret_and_resumes(secret_recipe, tmp_path, monkeypatch):
    output = tmp_path / "run"
    stage.run(load_recipe(str(secret_recipe)), "secret", output)
    leaks = [
        path
        for path in output.rglob("*")
        if path.is_file() and (b"hunter22" in (content := path.read_bytes()) or TOKEN.encode() in content)
    ]
    assert leaks == []
    record = json.loads((output / "finetune/final/tinyllava.json").read_text())
    assert "${oc.env:SERVICE_TOKEN}" in record["run"]["recipe_yaml"]
    # Another value of the secret is no other run, and neither is a record that has it in clear, as earlier ones do.
    monkeypatch.setenv("SERVICE_TOKEN", "hunter44-long")
    assert RunRecord(output, load_recipe(str(secret_recipe)), "secret").changes == []


def test_errors_and_tracebacks_hide_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", "hunter22-long")
    code = (
        "import sys\nfrom tinyllava.cli import main, app\nfrom tinyllava.errors import UserError\n"
        "@app.command('fail')\ndef fail(kind: str): raise (UserError if kind == 'user' else RuntimeError)("
        f"'cannot use hunter22-long and {TOKEN}')\nmain(sys.argv[1:])\n"
    )
    for arguments in (["fail", "user"], ["fail", "user", "--debug"], ["fail", "other"], ["--debug", "fail", "other"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=100)
        assert done.returncode != 0 and "cannot use *** and ***" in done.stderr, done.stderr
        # A traceback shows lines of source code, and this test's own contains the secret's text.
        assert "hunter22" not in done.stderr and TOKEN not in done.stderr


def test_a_model_card_hides_the_secrets_of_a_record_of_earlier_versions():
    vlm = checkpoint.load(NANO_FOLDER / "model")
    text = (
        "stages:\n  finetune:\n    data: [{path: a.json}]\n    trainer: {hub_token: hunter22, run_name: "
        + TOKEN
        + "}\n"
    )
    run = {"recipe": "x", "stage": "finetune", "step": 1, "versions": {}, "recipe_yaml": text}
    card = str(make_model_card(vlm, run, {}, "name"))
    assert "hunter22" not in card and TOKEN not in card and "hub_token: ***" in card
