"""The command line: its commands and options, and one clear line for each error."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from tests.cli_tools import CommandResult, assert_refused, recipe, run_command_line, write_recipe  # noqa: F401  (the fixture `tinyllava`)
from tinyllava import cli
from tinyllava.commands import parts
from tinyllava.factory import KINDS, Factory

SURFACE = {  # growth is a decision: a new verb or option is added here, with a reason in its pull request
    "train": ["recipe", "overrides", "--output", "--overwrite", "--data"],
    "look": ["recipe", "overrides", "--offline"],
    "chat": ["checkpoint", "images", "--prompt", "--temperature", "--max-new-tokens", "--lacking"],
    "eval": ["checkpoint", "--tasks", "--data", "--output", "--judge", "--compare", "--lacking"],
    "score": ["task", "--answers", "--data", "--output", "--allow-partial", "--judge"],
    "export": ["checkpoint", "--to", "--output", "--push", "--dtype", "--lacking"],
    "list": ["kind"],
    "data cache": ["--prune"],
    "data check": ["source", "--images"],
    "data prepare": ["names", "--root", "--check"],
    "doctor": ["checkpoint", "--accept"],
}


# -- what there is -----------------------------------------------------------------------------------------------------


def test_commands_and_options_are_those_listed_here() -> None:
    def parameters(command: object) -> list[str]:
        return [one.name if one.param_type_name == "argument" else one.opts[-1] for one in command.params]

    group = get_command(cli.app)
    assert parameters(group) == ["--debug"]
    actual = {name: parameters(one) for name, one in group.commands.items() if name != "data"}
    actual |= {f"data {name}": parameters(one) for name, one in group.commands["data"].commands.items()}
    assert actual == SURFACE


def test_help_and_list_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom tinyllava import cli\n"
        "try:\n    cli.main(['list'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'accelerate', 'peft', 'PIL', 'numpy'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"imported: {done.stderr}"


@pytest.mark.parametrize(
    ("own", "policy"),
    [
        ({}, ("PASSIVE", "20000")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
        ({"GOMP_SPINCOUNT": "100"}, (None, "100")),
        ({"KMP_BLOCKTIME": "0"}, (None, None)),
    ],
)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(own: dict[str, str], policy: tuple) -> None:
    """A thread that spins takes the core from the thread that it waits for. torch's OpenMP must see the setting."""
    names = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    env = {name: value for name, value in os.environ.items() if name not in names} | own
    code = "import os, sys, tinyllava; assert 'torch' not in sys.modules; print(*map(os.environ.get, sys.argv[1:]))"
    command = [sys.executable, "-c", code, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [*map(str, policy)]


def test_help_names_every_command(tinyllava: Callable[..., CommandResult]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        result = tinyllava(*arguments)
        assert all(command.split()[0] in result.out for command in SURFACE), arguments
        assert "error" not in result.err
    assert "learning_rate=1e-4" in tinyllava("train", "--help").out


def test_list_shows_every_part_and_what_it_is(
    tinyllava: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:  # of this process, where tests before this one have registered parts
        monkeypatch.setattr(Factory(kind), "registered", {})
    everything = tinyllava("list").out
    for kind in KINDS:
        names = Factory(kind).list_names()
        shown = tinyllava("list", kind).out
        assert kind in everything and all(name in everything and name in shown for name in names)
        for name in names:
            line = parts.read_first_line(Factory(kind).find_path(name))
            assert len(line) > 20 and not line.startswith(("#", "`")), f"{kind}/{name} does not say what it is"
            assert line.split()[0] in shown


def test_list_shows_registered_parts(tinyllava: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine:
        """Folds features in half."""

    monkeypatch.setitem(Factory("connectors").registered, "mine", Mine)
    assert "Folds features in half." in tinyllava("list", "connectors").out


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["trian"], ["trian", "train"]),
        (["train"], ["RECIPE"]),
        (["train", "quickstrat"], ["unknown recipe 'quickstrat'", "did you mean 'quickstart'", "Known:"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml", "not found", "quickstart"]),
        (["train", "quickstart", "--outptu", "x"], ["--outptu"]),
        (["train", "quickstart", "seed"], ["'seed'", "key=value"]),
        (
            ["look", "quickstart", "stages.finetune.trainer.learning_rat=1"],
            ["learning_rat", "did you mean", "learning_rate"],
        ),
        (["look", "quickstart", "model.connector=mpl"], ["unknown connector 'mpl'", "did you mean 'mlp'"]),
        (["look", "quickstart", "stages.finetune.tune.llm=lroa"], ["unknown tuning 'lroa'", "did you mean 'lora'"]),
        (["train", "quickstart", "eval=[pope]"], ["pope", "--data"]),
        (["list", "recepies"], ["recepies", "did you mean 'recipes'"]),
        (["chat", "nowhere"], ["nowhere", "is not a directory"]),
        (["chat", "nowhere", "--temperature", "hot"], ["--temperature", "valid number"]),
        (["eval", "nowhere", "--tasks", "pop"], ["unknown benchmark 'pop'", "did you mean 'pope'"]),
        (["eval", "nowhere"], ["--tasks"]),
        (["export", "nowhere", "--to", "gguf", "--output", "x"], ["gguf", "merged, hf, adapter, split"]),
        (["data", "check", "quickstrat"], ["did you mean 'quickstart'"]),
        (["data", "check", "missing.json"], ["missing.json", "not found"]),
    ],
)
def test_a_mistake_gives_an_error_of_one_line(
    tinyllava: Callable[..., CommandResult], arguments: list[str], facts: list[str]
) -> None:
    assert_refused(tinyllava(*arguments), *facts)


def test_a_recipe_with_missing_files_is_refused(
    tinyllava: Callable[..., CommandResult], tmp_path: Path, pictures: Path
) -> None:
    path = write_recipe(tmp_path, recipe(pictures))
    assert_refused(tinyllava("look", path, "model.llm=nobody/no-such-llm"), "nobody/no-such-llm", "local directory")
    gone = tinyllava("look", path, f"stages.pretrain.data=[{{path: {tmp_path}/gone.json}}]")
    assert_refused(gone, "gone.json", "not found")
    folder = tinyllava(
        "look", path, f"stages.pretrain.data=[{{path: {pictures}/captions.json, images: {tmp_path}/no}}]"
    )
    assert_refused(folder, f"{tmp_path}/no", "images")


def test_a_half_written_checkpoint_is_refused(tinyllava: Callable[..., CommandResult], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    assert_refused(tinyllava("chat", tmp_path, "--prompt", "hi"), "incomplete")


def test_debug_shows_the_traceback_before_and_after_the_command(tinyllava: Callable[..., CommandResult]) -> None:
    for arguments in (["--debug", "list", "recepies"], ["list", "recepies", "--debug"]):
        result = tinyllava(*arguments)
        assert result.code == 2
        assert "Traceback" in result.err and "factory.py" in result.err
        assert result.err.rstrip().splitlines()[-1].startswith("error: ")


def test_a_full_or_forbidden_disk_gives_an_error_without_traceback(
    tinyllava: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr(parts, "show_parts", full)
    assert_refused(tinyllava("list"), "No space left on device", "runs/x")


def test_an_interrupted_run_says_how_to_resume(
    tinyllava: Callable[..., CommandResult], tmp_path: Path, pictures: Path
) -> None:
    from tinyllava.train import stage

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    path = write_recipe(tmp_path, recipe(pictures))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "run", interrupted)
        result = tinyllava("train", path, "seed=3", "--output", tmp_path / "my run", "--overwrite")
    assert result.code == 130 and "Traceback" not in result.err
    assert f"tinyllava train {path} seed=3 --output '{tmp_path / 'my run'}'" in result.err
    assert "--overwrite" not in result.err
