"""No damaged checkpoint is accepted: every file in turn, every kind of damage, by all that load one."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tinyllava as package
from tests.cli_tools import CommandResult, assert_refused, run_command_line, write_recipe  # noqa: F401  (the fixture `tinyllava`)
from tests.records import read, write_again, write_earlier
from tests.tiny_vlm import build_moved_vlm
from tests.train.tiny_run import recipe
from tinyllava import checkpoint, hashes
from tinyllava.commands.export import export_checkpoint
from tinyllava.commands.verify import examine_checkpoint, list_others
from tinyllava.errors import UserError
from tinyllava.resume import find_last_checkpoint, find_resume_fault
from tinyllava.train import stage

TUNE = {"llm": {"lora": {"r": 4, "alpha": 8}}, "connector": "full"}
RECORD = "tinyllava.json"


def replace(path: Path, content: bytes) -> None:
    """Write a file without changing others that are linked to it."""
    path.unlink()
    path.write_bytes(content)


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    replace(path, bytes(content))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "truncated": lambda path: replace(path, path.read_bytes()[:-1]),
    "halved": lambda path: replace(path, path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: replace(path, b""),
    "longer": lambda path: replace(path, path.read_bytes() + b"\n"),
    "zeros": lambda path: replace(path, bytes(path.stat().st_size)),
    "first byte": lambda path: flip(path, 0.0),
    "a byte in the middle": lambda path: flip(path, 0.5),
    "last byte": lambda path: flip(path, 1.0),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("gone")),
}


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a LoRA adapter: checkpoint-2, checkpoint-4 and final, whose base weights are links."""
    folder = tmp_path_factory.mktemp("run") / "run"
    stage.run(recipe(pictures, TUNE, stages=("finetune",), max_steps=4, save_steps=2), "tiny", folder)
    return folder / "finetune"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    checkpoint.save(build_moved_vlm(), folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "finetune"))


def list_names(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def damage_each(directory: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    """Damage each file in each way, and put it back."""
    for name in names:
        path, content = directory / name, (directory / name).read_bytes()
        for kind, damage in DAMAGES.items():
            damage(path)
            yield name, kind
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            path.write_bytes(content)


def assert_one_line(error: UserError, *words: str) -> None:
    text = str(error)
    assert len(text.splitlines()) <= 2 and len(text) < 700 and all(word in text for word in words), text


# -- every file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["final", "checkpoint-4", "full"])
def test_no_altered_file_of_a_model_is_loaded(which: str, run: Path, full: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(full if which == "full" else run / which, tmp_path / "copy"))
    names = [RECORD, *read(directory)["files"]]
    assert set(names) >= {"config.json", "tokenizer.json", "chat_template.jinja", "language_model.safetensors"}
    assert ("adapter_model.safetensors" in names) == (which != "full")
    tried = 0
    for name, kind in damage_each(directory, names):
        with pytest.raises(UserError) as error:
            checkpoint.load(directory)
        assert_one_line(error.value, str(directory) if kind == "deleted" else name)
        tried += 1
    assert tried == len(names) * len(DAMAGES) > 100
    checkpoint.load(directory)


def test_no_altered_file_is_resumed_from(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = copy / "checkpoint-4"
    names = list_names(newest)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", RECORD} <= set(names)
    for name, kind in damage_each(newest, names):
        assert name in find_resume_fault(newest, "plain", 1), kind
        if kind in ("deleted", "last byte", "a folder"):
            caplog.clear()
            assert find_last_checkpoint(copy, "plain", 1) == copy / "checkpoint-2", (name, kind)
            assert "skipped checkpoint-4: " in caplog.text and name in caplog.text, (name, kind)
    assert find_last_checkpoint(copy, "plain", 1) == newest
    shutil.rmtree(copy / "checkpoint-2")
    for name in names:
        flip(newest / name, 0.5)
        with pytest.raises(UserError, match=r"stage finetune cannot resume\. checkpoint-4: ") as error:
            find_last_checkpoint(copy, "plain", 1)
        assert_one_line(error.value, name)
        flip(newest / name, 0.5)


def test_no_byte_of_the_record_can_change(full: Path, tmp_path: Path) -> None:
    """The template that a checkpoint carries and the list of its files stand there too."""
    directory = Path(shutil.copytree(full, tmp_path / "copy"))
    content = (directory / RECORD).read_bytes()
    for place in range(0, len(content), 41):
        for mask in (1, 32, 128):
            changed = bytearray(content)
            changed[place] ^= mask
            (directory / RECORD).write_bytes(changed)
            with pytest.raises(UserError):
                checkpoint.read_record(directory)
    text = content.decode()
    edits = {
        "the template": text.replace("USER", "HUMAN", 1),
        "a file left out": json.dumps({**read(full), "files": {}}),
        "no lists": json.dumps({"format": 1, "files": {}, "model": {"connector": {}}}),
        "hashes left out": json.dumps(
            {**read(full), "files": {name: entry["bytes"] for name, entry in read(full)["files"].items()}}
        ),
        "another format": text.replace('"format": 2', '"format": 1'),
        "its own hash left out": json.dumps({k: v for k, v in read(full).items() if k != hashes.ALGORITHM}, indent=2),
        "spaces": json.dumps(read(full)),
        "a key twice": text.replace('"format": 2,', '"format": 1, "format": 2,'),
    }
    for kind, edited in edits.items():
        assert edited != text, kind
        (directory / RECORD).write_text(edited)
        with pytest.raises(UserError, match=r"tinyllava\.json has changed since it was written"):
            checkpoint.load(directory)


def test_files_of_another_checkpoint_are_noticed(run: Path, full: Path, copy: Path, tmp_path: Path) -> None:
    """Also where all sizes agree, as between two steps of one run."""
    for name in ("connector.safetensors", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json", RECORD):
        replace(copy / "checkpoint-4" / name, (run / "checkpoint-2" / name).read_bytes())
        assert find_last_checkpoint(copy, "plain", 1) == copy / "checkpoint-2"
        if name in read(run / "checkpoint-4")["files"]:
            with pytest.raises(UserError, match=f"damaged: {name} has changed"):
                checkpoint.load(copy / "checkpoint-4")
        replace(copy / "checkpoint-4" / name, (run / "checkpoint-4" / name).read_bytes())
    mixed = Path(shutil.copytree(full, tmp_path / "mixed"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "final" / name, mixed / name)
        with pytest.raises(UserError, match=r"adapter_config\.json is not in the record"):
            checkpoint.load(mixed)


LOADED = ["model.safetensors", "model.safetensors.index.json", "adapter_config.json", "special_tokens_map.json"]
LOADED += ["added_tokens.json", "preprocessor_config.json", "chat_template.json", "pytorch_model.bin"]


def test_added_files_are_fine_unless_they_would_be_loaded(full: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(full, tmp_path / "copy"))
    for name in ("README.md", ".DS_Store", ".gitattributes", "notes.txt", "LICENSE", "picture.png", "results.json"):
        (directory / name).write_text("mine")
    (directory / "eval").mkdir()
    checkpoint.load(directory)
    (directory / "README.md").write_text("mine, edited")
    assert list_others(directory, read(directory)["files"]) == [
        *("LICENSE", "eval/", "notes.txt", "picture.png", "results.json")
    ]
    for name in LOADED:
        before = (directory / name).read_bytes() if (directory / name).exists() else None
        (directory / name).write_bytes((full / "connector.safetensors").read_bytes() if "model" in name else b"{}")
        with pytest.raises(UserError) as error:
            checkpoint.load(directory)
        assert_one_line(error.value, name)
        (directory / name).unlink() if before is None else (directory / name).write_bytes(before)
    checkpoint.load(directory)


# -- every way in ------------------------------------------------------------------------------------------------------


def test_every_command_refuses_it(
    tinyllava: Callable[..., CommandResult], copy: Path, pictures: Path, tmp_path: Path
) -> None:
    flip(copy / "final" / "connector.safetensors", 0.9)
    reason = "connector.safetensors has changed since it was saved"
    assert_refused(tinyllava("chat", copy / "final", "--prompt", "What?"), reason)
    assert_refused(tinyllava("export", copy / "final", "--to", "hf", "--output", tmp_path / "out"), reason)
    content = {"model": {"checkpoint": str(copy / "final")}, "stages": {"more": {"data": [{"path": "stamps:small"}]}}}
    assert_refused(tinyllava("train", write_recipe(tmp_path, content), "--output", tmp_path / "next"), reason)
    with pytest.raises(UserError, match=reason):
        package.load(copy / "final", device="cpu")
    doctor = tinyllava("doctor", copy)
    assert doctor.code == 1 and reason in doctor.out and doctor.out.count(": whole") == 2
    assert tinyllava("chat", copy, "--prompt", "What?").code == 0  # a stage: its newest whole checkpoint


def test_a_damaged_final_checkpoint_is_made_again(copy: Path, pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`train` resumes from the last numbered checkpoint, which is whole, and its last step is not trained again."""
    stored = load_file(copy / "final" / "adapter_model.safetensors")
    flip(copy / "final" / "adapter_model.safetensors", 0.9)
    run = recipe(pictures, TUNE, stages=("finetune",), max_steps=4, save_steps=2)
    final = stage.run(run, "tiny", copy.parent)
    assert "skipped: " in caplog.text and "adapter_model.safetensors has changed" in caplog.text
    assert checkpoint.is_whole(final)
    torch.testing.assert_close(load_file(final / "adapter_model.safetensors"), stored, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["hf", "merged", "adapter"])
def test_exports_have_records_too(form: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(str(run / "final"), form, out, "me/mine", "auto", {})
    if form == "hf":
        (out / "README.md").write_text("my own card")
    path = out / "adapter" if form == "adapter" else out
    checkpoint.load(path)
    for directory in [out / "base", out / "adapter"] if form == "adapter" else [out]:
        assert examine_checkpoint(directory)[0] == []
        for name in read(directory)["files"]:
            content = (directory / name).read_bytes()
            flip(directory / name, 0.95)
            with pytest.raises(UserError):
                checkpoint.load(path)
            assert examine_checkpoint(directory)[0]
            replace(directory / name, content)


def test_an_exported_adapter_is_refused_beside_another_base(run: Path, full: Path, tmp_path: Path) -> None:
    export_checkpoint(str(run / "final"), "adapter", tmp_path / "out", "mine", "auto", {})
    shutil.rmtree(tmp_path / "out" / "base")
    shutil.copytree(full, tmp_path / "out" / "base")
    with pytest.raises(UserError, match="belongs to another base"):
        checkpoint.load(tmp_path / "out" / "adapter")


# -- paths -------------------------------------------------------------------------------------------------------------


def test_links_of_a_download_are_followed(full: Path, tmp_path: Path) -> None:
    """The Hub's cache has one folder of contents, and links to them for each revision."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate(list_names(full)):
        shutil.copy(full / name, blobs / str(number))
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    checkpoint.load(snapshot)
    flip((snapshot / "connector.safetensors").resolve(), 0.5)
    with pytest.raises(UserError, match=r"connector\.safetensors has changed"):
        checkpoint.load(snapshot)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x.safetensors", "C:\\x"]
)
def test_names_of_files_outside_are_refused(name: str, full: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(full, tmp_path / "copy"))
    shutil.copy(full / "connector.safetensors", tmp_path / "x.safetensors")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    weights = {weight: name if file.startswith("connector") else file for weight, file in index["weight_map"].items()}
    (directory / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": weights}))
    write_again(directory)
    with pytest.raises(UserError, match="which is not a file beside it"):
        checkpoint.load(directory)
    shutil.copytree(full, directory, dirs_exist_ok=True)
    record = read(directory)
    record["files"][name] = record["files"]["connector.safetensors"]
    (directory / RECORD).write_text(hashes.seal(record))
    with pytest.raises(UserError, match="is a path outside the checkpoint"):
        checkpoint.load(directory)


# -- what costs time ---------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read to compute a hash."""
    names: list[str] = []
    hash_content = hashes.hash_content
    monkeypatch.setattr(hashes, "hash_content", lambda path: names.append(path.name) or hash_content(path))
    return names


def test_links_keep_the_hash_of_the_file_that_was_saved_first(tmp_path: Path, reads: list[str]) -> None:
    vlm = build_moved_vlm()
    files = checkpoint.save(vlm, tmp_path / "a")
    reads.clear()
    checkpoint.save(vlm, tmp_path / "b", reuse={"llm": files["llm"]})
    assert "language_model.safetensors" not in reads and "connector.safetensors" in reads
    content = bytearray((tmp_path / "a" / "language_model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a" / "language_model.safetensors").write_bytes(content)  # in place: also the file in b
    checkpoint.save(vlm, tmp_path / "c", reuse={"llm": files["llm"]})
    for name in "abc":
        with pytest.raises(UserError, match=r"language_model\.safetensors has changed"):
            checkpoint.load(tmp_path / name)
    write_earlier(tmp_path / "a")  # it has no hashes
    checkpoint.save(vlm, tmp_path / "d", reuse={"llm": files["llm"]})
    checkpoint.load(tmp_path / "d")


@pytest.fixture
def settled(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that counts as large, and as written long ago."""
    monkeypatch.setattr(hashes, "SMALL", 20_000)
    monkeypatch.setattr(hashes, "RECENT", -1.0)
    return Path(shutil.copytree(full, tmp_path / "settled"))


def test_a_large_file_is_read_once_for_each_state(settled: Path, tmp_path: Path, reads: list[str]) -> None:
    path = settled / "language_model.safetensors"
    checkpoint.load(settled)
    assert path.name in reads and "config.json" in reads
    reads.clear()
    checkpoint.load(settled)
    assert path.name not in reads and "config.json" in reads
    shutil.copytree(settled, tmp_path / "copied", copy_function=shutil.copy2)  # as cp -p: the times are kept
    checkpoint.load(tmp_path / "copied")
    assert path.name in reads
    reads.clear()
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"language_model\.safetensors has changed"):
        checkpoint.load(settled)


def test_doctor_reads_every_file_again(settled: Path, reads: list[str]) -> None:
    checkpoint.load(settled)
    reads.clear()
    assert examine_checkpoint(settled)[0] == [] and set(read(settled)["files"]) <= set(reads)


def test_what_changed_a_moment_ago_is_not_marked(
    settled: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two changes within one tick of the file system's clock leave the same times."""
    monkeypatch.setattr(hashes, "RECENT", 3600.0)
    for _ in range(2):
        reads.clear()
        checkpoint.load(settled)
        assert "language_model.safetensors" in reads


def test_no_cache_is_required(settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only home: here the folder of the cache is below a file, because root may write everywhere."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path / "file" / "cache"))
    checkpoint.load(settled)
    monkeypatch.delenv("TINYLLAVA_CACHE")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    checkpoint.load(settled)


# -- earlier versions --------------------------------------------------------------------------------------------------


def test_records_without_hashes_still_load_and_a_missing_one_is_noticed(full: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(full, tmp_path / "copy"))
    write_earlier(directory)
    assert read(directory)["format"] == 1
    checkpoint.load(directory)
    damage, facts = examine_checkpoint(directory)
    assert damage == [] and "there are no hashes" in facts[0]
    (directory / "config.json").write_text((directory / "config.json").read_text() + " ")
    with pytest.raises(UserError, match=r"config\.json has \d+ bytes, expected \d+"):
        checkpoint.load(directory)
    (directory / RECORD).unlink()
    with pytest.raises(UserError, match=r"is damaged: tinyllava\.json is missing"):
        checkpoint.load(directory)
