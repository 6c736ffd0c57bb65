"""The cache: damage heals, two processes make an entry once, a read-only one is used, and old entries can go."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest

from tinyllava.cache import hash_files, mark_used, read_description
from tinyllava.cli import run_command
from tinyllava.config import DataSpec
from tinyllava.data import sources
from tinyllava.data.dataset import encode_source
from tinyllava.data.encode import Encoder
from tinyllava.data.options import DataOptions
from tinyllava.data.sources import open_source
from tinyllava.data.template import Template
from tinyllava.errors import UserError

ROOT = Path(__file__).parents[2]
PARTIAL = ".half-0123456789abcdef.arrow.partial"
TURNS = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "it"}]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    rows = [{"id": str(row), "messages": TURNS} for row in range(300)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    return {"records": str(tmp_path / "data.jsonl"), "datasets": str(tmp_path / "data.parquet")}


@pytest.fixture
def encode(tokenizer, cache: Path) -> Callable:
    options = DataOptions(Template.load("phi"), tokenizer, 4, pixels=None, max_length=100)
    return lambda path: encode_source(open_source(DataSpec(path=path)), Encoder(options), cache)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zero_end(file: Path) -> None:
    """What a loss of power leaves: the size is right."""
    content = file.read_bytes()
    file.write_bytes(content[: -len(content) // 3] + bytes(len(content) - len(content[: -len(content) // 3])))


def flip_start(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, zero_end, flip_start, lambda file: file.write_bytes(b""), Path.unlink])
def test_a_damaged_entry_is_made_again_once(damage: Callable, files: dict, encode, cache: Path, caplog) -> None:
    rows = {kind: encode(path).to_dict() for kind, path in files.items()}
    found = {kind: next((cache / kind).rglob("*.arrow")) for kind in (*files, "tokenised")}
    for kind, file in found.items():
        damage(file)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for which, path in files.items():
                assert encode(path).to_dict() == rows[which]
        assert len([line for line in caplog.messages if "it is made again" in line]) == 1, kind
        caplog.clear()
        for path in files.values():
            encode(path)
        assert not caplog.messages


def test_a_damaged_description_is_no_entry(files: dict, encode, cache: Path) -> None:
    wanted = encode(files["records"]).to_dict()
    for text in ("", "[]", "{}", '{"files": 3}', '{"files": {"a": ""}}', '{"files": {"../../x": "1"}, "source": 1}'):
        for path in cache.rglob("*/*.json"):
            path.write_text(text)
            assert read_description(path) == {}
        assert encode(files["records"]).to_dict() == wanted


RUN = """
import sys, time
from pathlib import Path
from tinyllava.config import DataSpec
from tinyllava.data.sources import _json, open_source
convert = _json._convert
def slow(path, target):
    print("converting", flush=True)
    time.sleep(1)
    return convert(path, target)
_json._convert = slow
print(len(open_source(DataSpec(path=sys.argv[1]))))
"""


def start(cache: Path, code: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "TINYLLAVA_CACHE": str(cache), "PYTHONPATH": str(ROOT), "HF_HOME": f"{cache}-hf"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_make_an_entry_once(files: dict, cache: Path) -> None:
    runs = [start(cache, RUN, files["records"]) for _ in range(2)]
    said = sorted(run.communicate()[0] for run in runs)
    assert said == ["300\n", "converting\n300\n"]


OPEN = """
import sys
from tinyllava.config import DataSpec
from tinyllava.data.sources import open_source
print(*(len(open_source(DataSpec(path=path))) for path in sys.argv[1:]))
"""


def test_a_cache_that_is_read_only_is_used(files: dict, encode, cache: Path, tmp_path: Path) -> None:
    """For what it has. What it has not is an error with the remedy."""
    for path in files.values():
        encode(path)
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps({"messages": TURNS}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources._json, "_convert", lambda *_: pytest.fail("converted again"))
        with read_only(cache):
            assert [len(encode(path)) for path in files.values()] == [300, 300]
    refused = r"cannot write to the cache .*records: .*Set TINYLLAVA_CACHE"
    with read_only(cache), pytest.raises(UserError, match=refused):
        open_source(DataSpec(path=str(new)))


def test_a_cache_that_is_read_only_and_empty_names_the_way_out(files: dict, cache: Path) -> None:
    cache.mkdir()
    refused = r"cannot write to the cache .*: Permission denied\. Set TINYLLAVA_CACHE"
    with read_only(cache), pytest.raises(UserError, match=refused):
        open_source(DataSpec(path=files["records"]))


@contextmanager
def read_only(cache: Path) -> Iterator[None]:
    """root may write anywhere, so root is another user here."""
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for parent in cache.parents:
        if parent.stat().st_uid == os.getuid() and parent.stat().st_mode & 0o055 != 0o055:
            parent.chmod(parent.stat().st_mode | 0o055)
    for path in cache.parent.iterdir():
        path.chmod(path.stat().st_mode | 0o044)
    user = os.getuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path in (cache, *cache.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def show(capsys, *options: str) -> str:
    capsys.readouterr()
    assert run_command(["data", "cache", *options], debug=False) == 0
    out = capsys.readouterr().out
    print(out)
    return " ".join(out.split())


def test_the_cache_is_listed_and_pruned(files: dict, cache: Path, capsys) -> None:
    assert show(capsys) == f"{cache}: 0 entries, 0.0 MB"
    for path in files.values():
        open_source(DataSpec(path=path))
    (cache / "stamps" / "tiny-v1-seed0").mkdir(parents=True)
    (cache / "stamps" / "tiny-v1-seed0" / "a.jpg").write_bytes(b"1" * 200_000)
    (cache / "records" / PARTIAL).write_bytes(b"1" * 300_000)
    shown = show(capsys)
    assert "4 entries" in shown and shown.count("in use") == 2 and "/data.jsonl" in shown
    assert "not described" in shown and "--prune" not in shown

    long_ago = time.time() - 40 * 24 * 3600
    for path in (
        *cache.rglob("*.json"),
        cache / "stamps" / "tiny-v1-seed0",
        cache / "records" / PARTIAL,
    ):
        os.utime(path, (long_ago, long_ago))
    shown = show(capsys)
    assert "not used for 40 days" in shown and "left over" in shown and "deletes 2 of them, 0.5 MB" in shown
    assert "deleted 2 entries, 0.5 MB" in show(capsys, "--prune")
    assert not (cache / "stamps" / "tiny-v1-seed0").exists() and not (cache / "records" / PARTIAL).exists()
    assert len(open_source(DataSpec(path=files["records"]))) == 300  # this process uses it: it stays, however old

    (old,) = (cache / "records").glob("*.json")
    copy = old.with_name("other-0123456789abcdef.json")  # of no process
    copy.write_text(old.read_text())
    os.utime(copy, (long_ago, long_ago))
    shown = show(capsys)
    assert "not used for 40 days" in shown
    mark_used(copy)
    assert "not used" not in show(capsys)
    os.truncate(next((cache / "records").glob("*.arrow")), 10)
    assert "damaged" not in show(capsys, "--prune")  # both are in use here


def test_a_damaged_entry_that_nobody_uses_is_pruned(files: dict, cache: Path, capsys) -> None:
    run = start(cache, OPEN, files["records"])
    assert run.communicate()[0] == "300\n"
    truncate(next((cache / "records").glob("*.arrow")))
    assert "damaged" in show(capsys)
    assert "deleted 1 entries" in show(capsys, "--prune")
    assert [path.suffix for path in (cache / "records").iterdir()] == [".lock"]


def test_nothing_of_the_user_is_deleted(files: dict, tmp_path: Path, capsys, monkeypatch) -> None:
    """TINYLLAVA_CACHE=$HOME, or a folder of the user's own data sets with names like those of our folders."""
    home = tmp_path / "home"
    monkeypatch.setenv("TINYLLAVA_CACHE", str(home))
    key = "0123456789abcdef"
    names = ["thesis.tex", "docs/a.arrow", "datasets/coco.json", f"datasets/coco/{key}.jpg", "records/tax.json"]
    names += ["records/tax_2024.pdf", "gguf/mine/a.gguf", "stamps/mine/a.png", "tokenised/a.arrow", f"{key}.arrow"]
    names += ["datasets/audio/x.arrow", f"docs/x-{key}.arrow", ".cache/pip/x.arrow"]
    ours = [f"records/x-{key}.json", f"tokenised/{key}.arrow", f"gguf/x-{key}/a.bin", f"records/.x-{key}.arrow.partial"]
    ours += [f"datasets/parquet/default-{key}/0.0.0/{key}/parquet-train.arrow", "stamps/tiny-v1-seed0/a.png"]
    ours += [f"datasets/q/default/0.0.0/{key}.incomplete/q-train-00000-00000-of-NNNNN.arrow"]
    for name in (*names, *ours):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("1")
    # A description that names files elsewhere, which are what it says.
    described = {"source": "?", "made": "", "files": {"../docs/a.arrow": hash_files(str(home / "docs" / "a.arrow"))}}
    (home / "records" / f"x-{key}.json").write_text(json.dumps(described))
    (home / "gguf" / f"link-{key}").symlink_to(home / "gguf" / "mine")
    long_ago = time.time() - 400 * 24 * 3600
    for path in home.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    assert f"deleted {len(ours) + 1} entries" in show(capsys, "--prune")
    left = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert left == set(names)
