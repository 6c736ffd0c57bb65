"""Resuming: what may change between two starts and what may not, changed data, damage, and files that are not ours."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import TrainerState, TrainingArguments

from tests.records import read, write_again, write_earlier
from tests.train.test_stage import load_weights, read_losses
from tests.train.tiny_run import recipe
from tinyllava import checkpoint
from tinyllava.config import Recipe
from tinyllava.errors import UserError
from tinyllava.find import find_checkpoint
from tinyllava.identity import EXECUTION, JUDGED, check_data_unchanged
from tinyllava.locks import lock_run
from tinyllava.resume import find_last_checkpoint
from tinyllava.runs import (
    has_stopped_early,
    is_ours,
    list_checkpoints,
    make_room,
    read_run,
    rotate_checkpoints,
)
from tinyllava.train import stage
from tinyllava.train.callbacks import read_metrics
from tinyllava.train.record import RunRecord

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of nine steps, three an epoch, whose last step is short. It keeps all checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    stage.run(recipe(pictures, stages=("finetune",), save_total_limit=9), "tiny", run)
    return run


@pytest.fixture
def killed(whole: Path, tmp_path: Path) -> Path:
    """The same run as if it was killed after step 4, in the middle of its second epoch."""
    later = shutil.ignore_patterns("final", *(path.name for path in list_checkpoints(whole / "finetune")[:-2]))
    return Path(shutil.copytree(whole, tmp_path / "killed", ignore=later))


def change(pictures: Path, *edits: Change) -> Recipe:
    """The recipe of `whole` with edits of its content."""
    content = recipe(pictures, stages=("finetune",), save_total_limit=9).model_dump()
    for edit in edits:
        edit(content)
    return Recipe.model_validate(content)


def set_trainer(**options: Any) -> Change:
    return lambda content: content["stages"]["finetune"]["trainer"].update(options)


def set_stage(**options: Any) -> Change:
    return lambda content: content["stages"]["finetune"].update(options)


def set_data(**options: Any) -> Change:
    return lambda content: content["stages"]["finetune"]["data"][0].update(options)


def drop_validation(content: dict[str, Any]) -> None:
    """Remove the held-out share, and when it is used."""
    content["stages"]["finetune"]["validation"] = None
    del content["stages"]["finetune"]["trainer"]["eval_steps"]


def truncate(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


# -- settings ----------------------------------------------------------------------------------------------------------


def test_how_a_run_is_executed_may_change_and_what_is_not_ours_stays(
    whole: Path, killed: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = killed / "finetune"
    foreign = ["best", "2 (copy)", "2.bak", "2-keep", "02", "-1", "2x", "7", "13"]
    for name in foreign:  # 13 would be the newest, and the run needs the place of checkpoint-7 itself
        shutil.copytree(folder / "checkpoint-2", folder / f"checkpoint-{name}")
    (folder / "checkpoint-5").write_text("notes")
    (folder / "checkpoint-11").symlink_to(folder / "checkpoint-2")
    options = {"per_device_train_batch_size": 1, "gradient_checkpointing": True, "save_total_limit": 2, "save_steps": 7}
    with caplog.at_level(logging.INFO, "tinyllava"):
        stage.run(change(pictures, set_trainer(**options)), "tiny", killed)
    assert "resuming from checkpoint-4" in caplog.text
    assert read_losses(killed) == pytest.approx(read_losses(whole), rel=1e-5)
    assert sorted(read_losses(killed)) == list(range(1, 10))

    changes = json.loads((killed / "run.json").read_text())["changes"]
    assert {each["setting"].rpartition(".")[2]: (each["before"], each["now"]) for each in changes} == {
        "per_device_train_batch_size": (4, 1),
        "gradient_checkpointing": (None, True),
        "save_total_limit": (9, 2),
        "save_steps": (2, 7),
    }
    assert {(each["stage"], each["step"]) for each in changes} == {("finetune", 4)}
    (line,) = [record.message for record in caplog.records if "changed since" in record.message]
    assert "finetune.trainer.per_device_train_batch_size 4 -> 1" in line
    assert read_run(folder / "final")["changes"] == changes  # the record of the checkpoint has them too
    assert RunRecord(killed, change(pictures, set_trainer(**options)), "tiny").changes == []

    # The new interval was used: 7, and the last step. Two of ours are kept, and everything of the user's.
    assert [path.name for path in list_checkpoints(folder) if is_ours(path)] == ["checkpoint-9", "checkpoint-7"]
    left = {path.name for path in folder.iterdir() if path.name.startswith("checkpoint-")}
    kept = {f"checkpoint-{name}" for name in foreign} | {"checkpoint-5", "checkpoint-11", "checkpoint-7.kept-1"}
    assert left == kept | {"checkpoint-9"}
    assert read_run(folder / "checkpoint-7.kept-1")["step"] == read_run(folder / "checkpoint-13")["step"] == 2


DECISIVE = {
    "trainer.learning_rate 0.002 -> 0.1": set_trainer(learning_rate=0.1),
    "trainer.num_train_epochs 3 -> 4": set_trainer(num_train_epochs=4),
    "trainer.max_steps -1 -> 5": set_trainer(max_steps=5),
    "trainer.weight_decay 0.0 -> 0.1": set_trainer(weight_decay=0.1),
    "trainer.lr_scheduler_type linear -> cosine": set_trainer(lr_scheduler_type="cosine"),
    "trainer.warmup_steps 0 -> 2": set_trainer(warmup_steps=2),
    "trainer.optim adamw_torch_fused -> sgd": set_trainer(optim="sgd"),
    "trainer.max_grad_norm 1.0 -> 0.5": set_trainer(max_grad_norm=0.5),
    "trainer.bf16 False -> True": set_trainer(bf16=True),
    "trainer.label_smoothing_factor 0.0 -> 0.1": set_trainer(label_smoothing_factor=0.1),
    "trainer.dataloader_drop_last False -> True": set_trainer(dataloader_drop_last=True),
    "trainer.of_a_later_version not set -> 1": set_trainer(of_a_later_version=1),
    # It chooses the weights, so when it evaluates matters too.
    "trainer.eval_steps 3 -> 1": set_trainer(load_best_model_at_end=True, eval_steps=1),
    "finetune.global_batch_size 8 -> 4": set_stage(global_batch_size=4),
    "finetune.max_length not set -> 99": set_stage(max_length=99),
    "finetune.template not set -> plain": set_stage(template="plain"),
    "finetune.validation 0.2 -> 0.3": set_stage(validation=0.3),
    "data.0.weight 1.0 -> 2.0": set_data(weight=2.0),
    "data.0.streaming False -> True": set_data(streaming=True),
    "data (entries) 1 -> 2": lambda content: content["stages"]["finetune"]["data"].append({"path": "b.json"}),
    "seed 42 -> 7": lambda content: content.update(seed=7),
    "model.max_length": lambda content: content["model"].update(max_length=77),
    "model.dtype auto -> bfloat16": lambda content: content["model"].update(dtype="bfloat16"),
    "tune.llm.tuning.full {} -> not set": lambda content: content["stages"]["finetune"]["tune"].update(llm="frozen"),
    "tune.connector.lr not set -> 0.5": lambda content: content["stages"]["finetune"]["tune"]["connector"].update(
        lr=0.5
    ),
    "stages ['finetune'] -> ['before']": lambda content: content.update(
        stages={"before": content["stages"]["finetune"], **content["stages"]}
    ),
    "stages ['finetune'] -> ['other']": lambda content: content.update(stages={"other": content["stages"]["finetune"]}),
}


@pytest.mark.parametrize("named", DECISIVE)
def test_what_decides_the_result_may_not_change(named: str, whole: Path, pictures: Path) -> None:
    with pytest.raises(UserError, match="another recipe") as error:
        RunRecord(whole, change(pictures, DECISIVE[named]), "tiny")
    assert named in str(error.value) and "--output" in str(error.value) and "--overwrite" in str(error.value)
    assert len(str(error.value)) < 900


FREE = [
    set_trainer(**{name: 3})
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "dataloader_num_workers", "logging_steps")
]
FREE += [
    set_trainer(eval_steps=1, eval_strategy="epoch", save_strategy="epoch"),
    set_trainer(report_to="tensorboard", run_name="x", include_for_metrics=["loss"]),
    set_trainer(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    set_trainer(deepspeed="zero2", ddp_timeout=9, use_cpu=True, torch_compile=True),
    set_trainer(weight_decay=0.0, max_steps=-1),  # what they were by default
    set_stage(on_bad_sample="skip"),  # after an image could not be read
    lambda content: content.update(eval=["pope"]),
    lambda content: content["stages"].update(later={**content["stages"]["finetune"], "global_batch_size": 4}),
    lambda content: content["model"]["llm"].update(attn_implementation="eager"),
]


@pytest.mark.parametrize("edit", FREE)
def test_the_execution_may_change(edit: Change, whole: Path, pictures: Path) -> None:
    record = RunRecord(whole, change(pictures, edit), "tiny")
    assert record.content["stages"]["finetune"]["finished"]
    assert json.dumps([each.to_dict() for each in record.changes])


def test_a_number_in_quotes_is_the_number(whole: Path, pictures: Path) -> None:
    assert RunRecord(whole, change(pictures, set_trainer(learning_rate="2e-3")), "tiny").changes == []


def test_the_names_of_the_execution_are_those_of_the_arguments() -> None:
    known = {field.name for field in fields(TrainingArguments)}
    assert known >= EXECUTION >= JUDGED
    deciding = known - EXECUTION
    assert {
        "learning_rate",
        "bf16",
        "seed",
        "dataloader_in_order",
        "ignore_data_skip",
        "neftune_noise_alpha",
    } <= deciding


def test_a_secret_is_neither_compared_nor_recorded(whole: Path, pictures: Path) -> None:
    record = RunRecord(whole, change(pictures, set_trainer(hub_token="hf_secret")), "tiny")
    assert record.changes == []


def test_devices_and_versions_that_change_are_recorded(
    whole: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("tinyllava.train.record.get_versions", lambda: {"torch": "9"})
    changes = {each.setting: each.now for each in RunRecord(whole, change(pictures), "tiny").changes}
    assert changes["devices"] == 2 and changes["versions.torch"] == "9"


def test_a_stage_that_has_not_begun_may_change(whole: Path, pictures: Path, tmp_path: Path) -> None:
    """The second stage was never reached; the first one is finished."""
    both = change(pictures, lambda content: content["stages"].update(second=dict(content["stages"]["finetune"])))
    shutil.copytree(whole, tmp_path / "run")
    RunRecord(tmp_path / "run", both, "tiny")
    both.stages["second"].trainer["learning_rate"] = 0.5
    RunRecord(tmp_path / "run", both, "tiny")
    both.stages["finetune"].trainer["learning_rate"] = 0.5
    with pytest.raises(UserError, match=r"stages\.finetune\.trainer\.learning_rate"):
        RunRecord(tmp_path / "run", both, "tiny")


# -- the end of a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_takes_the_same_steps_and_none_beyond_its_end(
    streaming: bool, pictures: Path, tmp_path: Path
) -> None:
    """24 records of a stream are three steps of 8, so step 4 of 7 is in its second pass."""
    stop = set_trainer(max_steps=7, save_steps=4, per_device_train_batch_size=4)
    content = change(pictures, stop, set_data(streaming=streaming), drop_validation)
    final = stage.run(content, "tiny", tmp_path)
    losses, weights = read_losses(tmp_path), load_weights(final)
    assert sorted(losses) == list(range(1, 8))
    shutil.rmtree(final)  # killed after the last checkpoint
    stage.run(content, "tiny", tmp_path)
    assert read_losses(tmp_path) == losses
    for name, tensor in load_weights(final).items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)

    if not streaming:  # seen above
        return
    for path in (final, tmp_path / "finetune" / "checkpoint-7"):
        shutil.rmtree(path)  # killed after step 4, and resumed with other micro-batches, in a worker process
    content.stages["finetune"].trainer |= {"per_device_train_batch_size": 1, "dataloader_num_workers": 1}
    stage.run(content, "tiny", tmp_path)
    assert read_losses(tmp_path) == pytest.approx(losses, rel=1e-5)


def test_a_run_that_stopped_early_is_over() -> None:
    def save(counter: int) -> TrainerState:
        saved = {"args": {"early_stopping_patience": 2}, "attributes": {"early_stopping_patience_counter": counter}}
        return TrainerState(stateful_callbacks={"EarlyStoppingCallback": saved})

    assert not has_stopped_early(TrainerState()) and not has_stopped_early(save(1))
    assert has_stopped_early(save(2))


# -- data --------------------------------------------------------------------------------------------------------------


def read_facts(pictures: Path, data: Path, validation: Path | None = None) -> dict[str, Any]:
    place = {"images": str(data.parent if (data.parent / "1.png").exists() else pictures)}
    other = [{"path": str(validation), **place}] if validation else None
    content = change(pictures, set_data(path=str(data), **place), set_stage(validation=other))
    setup = stage.prepare_stage(content, "finetune", empty=True)
    listed = setup.validation.sources if setup.validation else []
    return {"data": setup.dataset.sources, "validation": listed, "step": 4}


EDITS: dict[str, Callable[[list], Any]] = {
    "answer": lambda records: records[5]["conversations"][1].update(value="Another answer."),
    "order": lambda records: records.reverse(),
    "grown": lambda records: records.append({**records[0], "id": "new"}),
    "shrunk": lambda records: records.pop(),
}


def test_changed_data_is_refused_with_both_sizes(pictures: Path, tmp_path: Path) -> None:
    records = json.loads((pictures / "instructions.json").read_text())
    before = read_facts(pictures, pictures / "instructions.json", pictures / "captions.json")
    moved = Path(shutil.copytree(pictures, tmp_path / "moved"))
    same = read_facts(pictures, moved / "instructions.json", moved / "captions.json")
    check_data_unchanged("finetune", before, same)  # content decides, not the path
    for edit, count in zip(EDITS.values(), (24, 24, 25, 23), strict=True):
        changed = json.loads(json.dumps(records))
        edit(changed)
        (moved / "instructions.json").write_text(json.dumps(changed))
        now = read_facts(pictures, moved / "instructions.json", moved / "captions.json")
        with pytest.raises(UserError, match=rf"since step 4: it had 24 records.*now has {count} records.*Restore"):
            check_data_unchanged("finetune", before, now)
        swapped = {"step": 4, "data": before["validation"], "validation": before["data"]}
        with pytest.raises(UserError, match=r"the validation .* of stage finetune changed"):
            check_data_unchanged("finetune", {**swapped, "data": []}, {**now, "validation": now["data"]})
    with pytest.raises(UserError, match="the template, the tokenizer, images or the package"):
        now = {"data": [{**before["data"][0], "usable": 20}]}
        check_data_unchanged("finetune", before, now)
    earlier = {"data": [{key: before["data"][0][key] for key in ("path", "fingerprint", "records")}]}
    check_data_unchanged("finetune", earlier, before)  # a version that recorded less


def test_a_table_that_changed_in_its_middle_is_noticed(pictures: Path, tmp_path: Path) -> None:
    """The fingerprint of a table is of its ends. What is trained on is compared as a whole."""
    import datasets

    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "one"}]
    rows = [{"messages": turns} for _ in range(200)]
    facts = []
    for folder, answer in (("a", "one"), ("b", "two")):
        rows[100] = {"messages": [turns[0], {"role": "assistant", "content": answer}]}
        (tmp_path / folder).mkdir()
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / folder / "x.parquet")
        for streaming in (False, True):
            edits = set_data(path=str(tmp_path / folder / "x.parquet"), streaming=streaming), drop_validation
            tune = {"llm": "full", "connector": "frozen"}  # no record has an image
            content = change(pictures, *edits, set_trainer(max_steps=5), set_stage(tune=tune))
            facts.append({"step": 4, "data": stage.prepare_stage(content, "finetune", empty=True).dataset.sources})
    mapped, streamed = facts[::2], facts[1::2]
    assert mapped[0]["data"][0]["fingerprint"] == mapped[1]["data"][0]["fingerprint"]
    for before, now in (mapped, streamed):
        with pytest.raises(UserError, match="changed since"):
            check_data_unchanged("finetune", before, now)


def test_nothing_is_written_when_the_data_changed(killed: Path, pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(json.loads((pictures / "instructions.json").read_text())[::-1]))
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file() and "events" not in path.name}
    with pytest.raises(UserError, match=r"the data .* of stage finetune changed since step 4"):
        stage.run(change(pictures, set_data(path=str(data), images=str(pictures))), "tiny", killed)
    assert before == {path: path.read_bytes() for path in before}


def test_a_finished_stage_may_name_the_same_data_elsewhere(whole: Path, pictures: Path, tmp_path: Path) -> None:
    run, moved = shutil.copytree(whole, tmp_path / "run"), shutil.copytree(pictures, tmp_path / "moved")
    stage.run(change(pictures, set_data(path=str(moved / "instructions.json"))), "tiny", run)
    assert json.loads((run / "run.json").read_text())["changes"][0]["step"] == 9
    with pytest.raises(UserError, match=r"stage finetune is finished\. It was trained on .*instructions\.json"):
        stage.run(change(pictures, set_data(path=str(moved / "captions.json"))), "tiny", run)


# -- damage ------------------------------------------------------------------------------------------------------------

FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "tinyllava.json", "config.json"]
FILES += ["connector.safetensors", "tokenizer.json", "model.safetensors.index.json"]
DAMAGES = {"missing": Path.unlink, "empty": lambda path: truncate(path, 0.0), "half": truncate}
WITHOUT_CONTENT = ["connector.safetensors", "optimizer.pt", "trainer_state.json", "tinyllava.json"]


@pytest.mark.parametrize("earlier", [False, True], ids=["now", "earlier"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(
    name: str, earlier: bool, killed: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Records of earlier versions do not list the trainer's files."""
    newest = killed / "finetune" / "checkpoint-4"
    if earlier:
        assert {"optimizer.pt", "trainer_state.json"} <= read(newest)["training_state"].keys()
        write_earlier(newest, "training_state")
    content = (newest / name).read_bytes()
    for damage in DAMAGES.values():
        damage(newest / name)
        caplog.clear()
        assert find_last_checkpoint(killed / "finetune", "plain", 1) == newest.with_name("checkpoint-2")
        RunRecord(killed, change(pictures), "tiny")
        assert "skipped checkpoint-4" in caplog.text and name in caplog.text
        (newest / name).write_bytes(content)
    assert find_last_checkpoint(killed / "finetune", "plain", 1) == newest


@pytest.mark.parametrize("name", WITHOUT_CONTENT)
def test_a_file_of_zeros_is_damaged(name: str, killed: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A loss of power can leave a file with its size, but without its content."""
    path = killed / "finetune" / "checkpoint-4" / name
    size = path.stat().st_size
    path.unlink()  # it can be a link
    path.write_bytes(bytes(size))
    assert find_last_checkpoint(killed / "finetune", "plain", 1).name == "checkpoint-2"
    assert f"skipped checkpoint-4: {name}" in caplog.text


def test_a_run_without_a_whole_checkpoint_is_refused_and_kept(killed: Path, pictures: Path) -> None:
    for path in list_checkpoints(killed / "finetune"):
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):  # what `save_only_model: true` leaves out
            (path / name).unlink()
        write_earlier(path, "training_state")
    with pytest.raises(UserError, match=r"cannot resume.*optimizer\.pt is missing.*save_only_model.*checkpoint: DIR"):
        find_last_checkpoint(killed / "finetune", "plain", 1)


def test_a_stage_that_cannot_be_resumed_says_so_at_its_start(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tinyllava"):
        stage.prepare_stage(change(pictures, set_trainer(save_only_model=True)), "finetune", empty=True)
    assert "cannot be resumed" in caplog.text and "save_only_model" in caplog.text


def test_an_optimiser_state_of_another_engine_is_not_left_out(killed: Path) -> None:
    newest = killed / "finetune" / "checkpoint-4"
    for engine in ("deepspeed", "fsdp"):
        with pytest.raises(UserError, match=r"optimizer\.pt is of another engine"):
            find_last_checkpoint(killed / "finetune", engine, 1)
    (newest / "optimizer.pt").unlink()
    (newest / "scheduler.pt").unlink()
    (newest / "global_step4").mkdir()
    for rank in range(2):
        shutil.copy(newest / "rng_state.pth", newest / "global_step4" / f"zero_pp_rank_{rank}_optim_states.pt")
    write_again(newest)
    shutil.rmtree(newest.with_name("checkpoint-2"))
    assert find_last_checkpoint(killed / "finetune", "deepspeed", 2) == newest
    with pytest.raises(UserError, match=r"of 2 processes, not 4\. Resume with 2"):
        find_last_checkpoint(killed / "finetune", "deepspeed", 4)


TORN = {
    "empty": b"",
    "half": b'{"stages": {"fine',
    "binary": b"\xff\x00\xfe",
    "list": b"[1]",
    "number": b"3",
    "null": b"null",
}


@pytest.mark.parametrize("content", TORN.values(), ids=TORN)
def test_files_for_people_may_be_damaged(content: bytes, killed: Path, pictures: Path) -> None:
    for name in ("run.json", "recipe.yaml", "finetune/metrics.jsonl"):
        (killed / name).write_bytes(content)
    record = RunRecord(killed, change(pictures), "tiny")
    assert record.content["stages"]["finetune"]["data"][0]["records"] == 24 and record.changes == []
    with pytest.raises(UserError, match="learning_rate"):
        RunRecord(killed, change(pictures, set_trainer(learning_rate=1.0)), "tiny")
    assert read_metrics(killed / "finetune" / "metrics.jsonl") == []
    with pytest.raises(UserError, match=r"run\.json is damaged.*killed/finetune"):
        find_checkpoint(killed)
    assert find_checkpoint(killed / "finetune").name == "checkpoint-4"
    for path in list_checkpoints(killed / "finetune"):
        shutil.rmtree(path)
    RunRecord(killed, change(pictures, set_trainer(learning_rate=1.0)), "tiny")  # there is nothing to resume


def test_changed_bytes_in_the_state_of_the_optimiser_are_noticed(killed: Path) -> None:
    newest = killed / "finetune" / "checkpoint-4"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content.replace(b"data.pkl", b"data.pkx", 1))
        assert find_last_checkpoint(killed / "finetune", "plain", 1) == newest.with_name("checkpoint-2")
        half = len(content) // 2
        (newest / name).write_bytes(content[:half] + bytes(len(content) - half))  # what a loss of power can leave
        assert find_last_checkpoint(killed / "finetune", "plain", 1) == newest.with_name("checkpoint-2")
        (newest / name).write_bytes(content)
    assert find_last_checkpoint(killed / "finetune", "plain", 1) == newest


# -- what is not ours --------------------------------------------------------------------------------------------------


def make_checkpoints(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "tinyllava.json").write_text(json.dumps({"run": {"step": step}}))


def test_what_is_in_the_place_of_a_checkpoint_is_renamed(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 2)
    place = tmp_path / "checkpoint-4"
    for number, make in enumerate((Path.mkdir, Path.touch, lambda path: path.symlink_to(tmp_path / "checkpoint-2"))):
        make(place)
        make_room(place)
        assert not place.is_symlink() and not place.exists()
        assert (tmp_path / f"checkpoint-4.kept-{number + 1}").exists()
    make_room(place)  # nothing is there
    make_room(tmp_path / "checkpoint-2")  # ours
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    def rotate(newest: int, limit: int | None, best: str | None = None) -> list[int]:
        rotate_checkpoints(tmp_path / f"checkpoint-{newest}", limit, best)
        return sorted(int(path.name.rpartition("-")[2]) for path in list_checkpoints(tmp_path))

    make_checkpoints(tmp_path, 2, 4, 6, 8, 10, 99)
    assert rotate(10, None) == rotate(10, 0) == rotate(10, 9) == [2, 4, 6, 8, 10, 99]
    assert rotate(10, 4) == [4, 6, 8, 10, 99]  # 99 was skipped at a resume
    assert rotate(10, 3, best="checkpoint-4") == [4, 8, 10, 99]
    assert rotate(10, 1, best="checkpoint-4") == [4, 10, 99]
    assert rotate(10, 1) == [10, 99]
    assert rotate(10, 1, best="checkpoint-10") == [10, 99]


def test_overwriting_deletes_only_a_run(whole: Path, pictures: Path, tmp_path: Path) -> None:
    album, run = tmp_path / "album", tmp_path / "run"
    album.mkdir()
    (album / "photo.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"album is not a run: it has no run\.json"):
        stage.run(change(pictures), "tiny", album, overwrite=True)
    assert (album / "photo.png").is_file()

    shutil.copytree(whole, run)
    shutil.copytree(run / "finetune" / "final", run / "finetune" / "checkpoint-2-keep")
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"gone\.json not found"):  # everything is checked first
        stage.run(change(pictures, set_data(path="gone.json")), "tiny", run, overwrite=True)
    assert checkpoint.is_whole(run / "finetune" / "final")

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    other = change(pictures, set_trainer(max_steps=1, save_strategy="no"), lambda content: content.update(seed=7))
    for _ in range(2):  # before the first checkpoint, also when it is tried again
        with pytest.raises(ZeroDivisionError):
            stage.run(other, "tiny", run, overwrite=True, follow=fail)
        aside = run / ".replaced"
        assert checkpoint.is_whole(aside / "finetune" / "final") and read_losses(aside) == read_losses(whole)
        assert len(list_checkpoints(aside / "finetune")) == len(list_checkpoints(whole / "finetune"))
    stage.run(other, "tiny", run)
    assert sorted(read_losses(run)) == [1]
    assert list_checkpoints(run / "finetune") == [] and (run / "notes.txt").is_file() and not aside.exists()
    assert checkpoint.is_whole(run / "finetune" / "checkpoint-2-keep")


def test_what_a_kill_left_unfinished_is_cleared_and_what_it_replaced_comes_back(killed: Path, pictures: Path) -> None:
    folder = killed / "finetune"
    (folder / "checkpoint-4").rename(folder / ".checkpoint-4.replaced")
    shutil.copytree(folder / "checkpoint-2", folder / ".checkpoint-2.replaced")
    for name in (".checkpoint-4.partial", ".final.partial", ".mine.partial"):
        (folder / name).mkdir()
    (folder / ".metrics.jsonl.partial").touch()
    with lock_run(killed):
        pass
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4", "checkpoint-2"]
    assert [path.name for path in folder.glob(".*")] == [".mine.partial"]


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "/tmp/a", ".hidden", "a\\b", "eval", "run.json", "a" * 101, "a\n"]
)
def test_a_stage_is_a_folder_of_the_run(name: str, pictures: Path) -> None:
    content = recipe(pictures, stages=("finetune",)).model_dump()
    with pytest.raises(ValidationError, match="the name of a stage is the name of its folder"):
        Recipe.model_validate({**content, "stages": {name: content["stages"]["finetune"]}})
    for good in ("stage-2", "étape 2", "a.b_c"):
        Recipe.model_validate({**content, "stages": {good: content["stages"]["finetune"]}})


def test_files_that_a_loss_of_power_emptied_and_a_wrong_clock_stop_no_resume(
    whole: Path, killed: Path, pictures: Path
) -> None:
    for name in ("run.json", "recipe.yaml", "finetune/metrics.jsonl", "finetune/checkpoint-4/trainer_state.json"):
        truncate(killed / name, 0.0)
    later = time.time() + 1e8
    for path in (killed / "finetune" / "checkpoint-2").rglob("*"):
        os.utime(path, (later, later))
    stage.run(change(pictures), "tiny", killed)
    expected = {step: loss for step, loss in read_losses(whole).items() if step > 2}  # the log before it is lost
    assert read_losses(killed) == pytest.approx(expected, rel=1e-6)
