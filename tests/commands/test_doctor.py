"""`tinyllava doctor`: what it tries out on this machine, with real processes, folders and servers."""

import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.cli_tools import CommandResult, assert_refused, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tests.tiny_vlm import build_moved_vlm
from tinyllava import checkpoint
from tinyllava.commands import probes
from tinyllava.commands.doctor import EXTRAS, find_problems, list_requirements
from tinyllava.console import output
from tinyllava.errors import UserError
from tinyllava.find import NANO_FOLDER


def test_doctor_shows_this_machine_in_80_columns(
    tinyllava: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "_width", 80)
    well = tinyllava("doctor")
    assert max(len(line) for line in well.out.splitlines()) <= 80
    shown = " ".join(well.out.split())  # lines are wrapped
    assert well.code == 0 and "no known problems" in shown
    for words in (torch.__version__, "transformers", "GiB free", "sdpa", "extra deepspeed", "ZeRO-2 and ZeRO-3"):
        assert words in shown
    assert "gloo" in shown and "file locks work" in shown and "HF_HUB_OFFLINE is set" in shown
    assert list(tmp_path.iterdir()) == []


def test_packages_that_do_not_work_together_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_problems() == []
    for name, version in (("timm", "1.0.31"), ("pillow", "13.0.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    ill = "\n".join(find_problems())
    assert "timm without torchvision" in ill and "pillow 13.0.0 is installed, but" in ill and "<13" in ill


def test_every_extra_says_what_it_gives() -> None:
    """`serve` is listed in pyproject.toml, and no command uses it."""
    listed = Path(__file__).parents[2].joinpath("pyproject.toml").read_text().partition("optional-dependencies]\n")[2]
    names = {line.partition(" =")[0] for line in listed.partition("\n\n")[0].splitlines()}
    assert names - {"serve"} == set(EXTRAS) and any(one.name == "deepspeed" for one in list_requirements())


def test_processes_that_cannot_reach_each_other_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROCESSES_LIMIT", 300.0)  # only a network that does not work is tested here
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuchinterface0")
    finding = probes.try_processes("gloo")
    assert finding.fact == "gloo fails"
    assert "nosuchinterface0" in finding.problem and "Set GLOO_SOCKET_IFNAME" in finding.problem


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "gone"):
        finding = probes.try_output(place)
        assert finding.problem.startswith(f"cannot write to {place}: N") and "--output" in finding.problem
    assert probes.try_output(tmp_path).problem is None and len(list(tmp_path.iterdir())) == 1


def test_the_hub_is_asked_and_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and never answers
        monkeypatch.setattr(probes, "HUB_LIMIT", 0.2)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://me:secret@127.0.0.1:{silent.getsockname()[1]}")
        fact = probes.try_hub().fact
        assert "127.0.0.1 cannot be reached: " in fact and "secret" not in fact
    assert "cannot be reached" in probes.try_hub().fact  # now closed
    for wrong in (
        "nonsense",
        "http://[",
        "http://a:b:c",
        "ftp://x",
        "http://me:secret@:99999",
        "http://\x01",
        "http://ü",
    ):
        monkeypatch.setattr(constants, "ENDPOINT", wrong)
        fact = probes.try_hub().fact
        assert "cannot be reached" in fact and "secret" not in fact, wrong


def test_a_probe_that_hangs_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(probes, "SLACK", 0.0)
    monkeypatch.setattr(probes, "HUB_LIMIT", 0.1)
    monkeypatch.setattr(probes, "try_hub", lambda: never.wait() and None)
    monkeypatch.setattr(probes, "try_processes", lambda backend: probes.Finding("not tried here"))
    monkeypatch.setattr(probes, "try_output", lambda folder: (_ for _ in ()).throw(OSError(24, "Too many open files")))
    start = time.monotonic()
    findings = probes.run_probes(tmp_path)
    never.set()
    assert findings["Hub"].fact == "no answer in 0 s" and time.monotonic() - start < 60
    assert "Too many open files" in findings["output folder"].problem


# -- a checkpoint ------------------------------------------------------------------------------------------------------


def test_doctor_reads_a_checkpoint_a_run_and_nano(tinyllava: Callable[..., CommandResult], tmp_path: Path) -> None:
    nano = tinyllava("doctor", "nano")
    assert nano.code == 0 and "whole" in nano.out and "10 files have their xxh3_128 hashes" in nano.out
    run = tmp_path / "run"
    for name in ("checkpoint-4", "checkpoint-12", "final"):
        checkpoint.save(build_moved_vlm(), run / "finetune" / name)
    (run / "finetune" / "checkpoint-4" / "config.json").unlink()
    (run / "finetune" / "checkpoint-12" / "tinyllava.json").unlink()
    (run / "finetune" / "final" / "notes.txt").touch()
    for path in (run, run / "finetune"):
        result = tinyllava("doctor", path)
        states = [line.rpartition("/")[2] for line in result.out.splitlines() if line.startswith(str(run))]
        assert result.code == 1 and states == ["checkpoint-4: damaged", "checkpoint-12: damaged", "final: whole"]
        assert "config.json is missing" in result.out and "tinyllava.json is missing" in result.out
        assert "not in its record: notes.txt" in result.out and "no state of an optimiser" in result.out
    assert tinyllava("doctor", run / "finetune" / "final").code == 0


def test_doctor_accepts_what_the_user_edited_but_no_damage(
    tinyllava: Callable[..., CommandResult], tmp_path: Path
) -> None:
    final = tmp_path / "final"
    checkpoint.save(build_moved_vlm(), final)
    settings = final / "generation_config.json"
    settings.write_text(settings.read_text().replace("{", '{"temperature": 0.2, "do_sample": true,', 1))
    (final / "chat_template.jinja").open("a").write("{# mine #}")
    (final / "added_tokens.json").write_text("{}")
    with pytest.raises(UserError, match=rf"If you edited it, run `tinyllava doctor {final} --accept`"):
        checkpoint.load(final)
    assert tinyllava("doctor", final).code == 1
    result = tinyllava("doctor", final, "--accept")
    assert result.code == 0
    assert "accepted: added_tokens.json, chat_template.jinja, generation_config.json" in result.out
    assert checkpoint.load(final).model.generation_config.temperature == 0.2
    assert "nothing was edited" in tinyllava("doctor", final, "--accept").out
    weights = final / "connector.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert tinyllava("doctor", final, "--accept").code == 1
    with pytest.raises(UserError, match=r"connector.safetensors has changed .* copy it again\.$"):
        checkpoint.load(final)
    weights.write_bytes(content)
    settings.write_text(settings.read_text()[:-9])
    assert_refused(tinyllava("doctor", final, "--accept"), "generation_config.json as JSON")
    (final / "tinyllava.json").write_text((final / "tinyllava.json").read_text().replace("llama", "plain"))
    assert_refused(tinyllava("doctor", final, "--accept"), "has changed since it was written")
    assert_refused(tinyllava("doctor", "--accept"), "needs a checkpoint")


def test_doctor_says_what_it_cannot_compare(tinyllava: Callable[..., CommandResult], tmp_path: Path) -> None:
    shutil.copytree(NANO_FOLDER / "vision_tower", tmp_path / "tower")
    result = tinyllava("doctor", tmp_path / "tower")
    assert result.code == 0 and "no hashes to compare" in result.out
    for name, content in (("tinyllava.json", "[]"), ("tinyllava.json", '{"format": 9}'), ("tinyllava.json", "{}")):
        (tmp_path / "tower" / name).write_text(content)
        assert tinyllava("doctor", tmp_path / "tower").code == 1
    (tmp_path / "empty").mkdir()
    assert_refused(tinyllava("doctor", tmp_path / "empty"), "no checkpoint in")
    assert_refused(tinyllava("doctor", tmp_path / "gone"), "not a directory")
