"""Checkpoint directories and runs of which a file is changed, missing, swapped or not what its name says."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from tests.fuzz.harness import Case
from tests.fuzz.mutate import edit_bytes, make_values, split_words
from tests.fuzz.targets.answers import edit_json
from tests.tiny_vlm import build_moved_vlm
from tinyllava import checkpoint, resume, runs
from tinyllava.errors import UserError
from tinyllava.files import check_model_files
from tinyllava.find import find_checkpoint
from tinyllava.hashes import ALGORITHM, hash_content, seal
from tinyllava.infer import Session
from tinyllava.record import find_part_files

KEYS = split_words("""
    format files model connector template name source compat run step stage recipe_yaml training_state model_type
    weight_map text_config vision_config metadata architectures dtype vocab_size hidden_size image_size
    image_token_index vision_feature_layer auto_map tokenizer_class processor_class image_processor_type peft_type r
    lora_alpha target_modules quantization_config eos_token pad_token added_tokens_decoder content id special
    chat_template size crop_size stages versions seed
""")
LORA = {"llm": {"lora": {"r": 2, "alpha": 4}}}


class Damage:
    """One damaged file: its name, its new content (None: removed), and a directory, a link or a copy in its place."""

    def __init__(self, name: str, content: bytes | None, form: str) -> None:
        self.name, self.content, self.form = name, content, form

    def __repr__(self) -> str:
        return f"{self.name} {self.form}: {self.content!r}"


class Directories:
    """Makes a directory of links to a whole checkpoint's files, with one of them damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.damaged = folder, folder / "run/finetune/checkpoint-2"
        self.wholes = []
        for name, tune in (("full", None), ("lora", LORA)):
            vlm = build_moved_vlm(tune)
            whole = folder / name
            checkpoint.save(vlm, whole, {"stage": "finetune", "step": 2, "recipe_yaml": "model: {}\n"})
            for extra in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.save({"a": torch.zeros(2)}, whole / extra)
            (whole / "trainer_state.json").write_text('{"global_step": 2, "stateful_callbacks": {}}')
            self.wholes.append(whole)
        (folder / "run/finetune").mkdir(parents=True)
        (folder / "run/run.json").write_text('{"stages": {"finetune": {}}, "versions": {}}')
        (folder / "run/recipe.yaml").write_text("stages: {finetune: {}}\n")

    def read_content(self, number: int, name: str) -> bytes:
        """A file's content; of weights only the header and some bytes are worth changing."""
        return (self.wholes[number] / name).read_bytes()

    def make(self, number: int, damages: list[Damage], extend: bool) -> Path:
        """extend: list the damaged files in the record with their hashes, as if it had been written with them.

        Otherwise a changed file is refused by its hash, and no reader behind sees it.
        """
        shutil.rmtree(self.damaged, ignore_errors=True)
        self.damaged.mkdir()
        whole = self.wholes[number]
        for path in whole.iterdir():
            os.link(path, self.damaged / path.name)
        for damage in damages:
            path = self.damaged / damage.name
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            path.unlink(missing_ok=True)
            if damage.form == "folder":
                path.mkdir(exist_ok=True)
            elif damage.form == "link":
                path.symlink_to("gone")
            elif damage.form == "copy":
                path.write_bytes((whole / "config.json").read_bytes())
            elif damage.content is not None and not path.is_dir():
                path.write_bytes(damage.content)
        if extend and (self.damaged / runs.RECORD).is_file():
            self._extend_record()
        return self.damaged

    def _extend_record(self) -> None:
        path = self.damaged / runs.RECORD
        record = runs.read_json_or_empty(path)
        for files in (record.get("files"), record.get("training_state")):
            for name in files if isinstance(files, dict) else ():
                with suppress(OSError, ValueError):
                    if (self.damaged / name).is_file():
                        changed = self.damaged / name
                        files[name] = {"bytes": changed.stat().st_size, ALGORITHM: hash_content(changed)}
        with suppress(UnicodeError):  # half a surrogate pair
            text = seal(record).encode()
            path.unlink()
            path.write_bytes(text)


def build(folder: Path) -> list[Case]:
    place = Directories(folder)
    values = make_values(KEYS)

    def damage(number: int) -> st.SearchStrategy[Any]:
        names = sorted(path.name for path in place.wholes[number].iterdir())
        each = []
        for name in names:
            content = place.read_content(number, name)
            changed = st.one_of(edit_bytes([content], most=3), *edit_json(content, values), st.none())
            forms = st.sampled_from(["file"] * 12 + ["folder", "link", "copy"])
            each.append(st.builds(Damage, st.just(name), changed, forms))
        return st.tuples(st.just(number), st.lists(st.one_of(each), min_size=1, max_size=2), st.booleans())

    damages = st.one_of([damage(number) for number in range(len(place.wholes))])
    run_files = {name: (folder / "run" / name).read_bytes() for name in ("run.json", "recipe.yaml")}
    run_damage = st.sampled_from(sorted(run_files)).flatmap(
        lambda name: st.tuples(
            st.just(name), st.one_of(edit_bytes([run_files[name]]), *edit_json(run_files[name], values))
        )
    )

    def read(input: tuple[int, list[Damage], bool]) -> None:
        directory = place.make(*input)
        checkpoint.is_whole(directory)
        resume.find_resume_fault(directory, "plain", 1)
        runs.read_begun_stages(folder / "run")
        read_each(
            lambda: checkpoint.read_record(directory),
            lambda: check_model_files(directory),
            lambda: find_part_files(directory),
            lambda: find_checkpoint(directory),
            lambda: find_checkpoint(folder / "run"),
            lambda: resume.find_last_checkpoint(folder / "run/finetune", "plain", 1),
        )

    def load(input: tuple[int, list[Damage], bool]) -> None:
        Session.load(place.make(*input), device="cpu")

    def read_run(input: tuple[str, bytes]) -> None:
        name, content = input
        place.make(0, [], False)
        try:
            (folder / "run" / name).write_bytes(content)
            runs.read_start(folder / "run")
            runs.read_begun_stages(folder / "run")
            find_checkpoint(folder / "run")
        finally:
            (folder / "run" / name).write_bytes(run_files[name])

    return [
        Case("checkpoints: read", damages, read),
        Case("checkpoints: load", damages, load, share=2),
        Case("checkpoints: runs", run_damage, read_run),
    ]


def read_each(*readers: Any) -> None:
    """Call all of them; raises the last of our own errors."""
    refused = None
    for reader in readers:
        try:
            reader()
        except UserError as error:
            refused = error
    if refused is not None:
        raise refused
