"""What a run tells its user: a log without gaps or repeats, a quiet progress bar, tokens in the right colour."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, TrainerControl, TrainerState, TrainingArguments

from tests.conftest import LLAMA
from tinyllava.config import LLMSpec
from tinyllava.data.sample import Sample
from tinyllava.data.spans import IGNORE
from tinyllava.data.template import Template, add_image_token, image_token_id
from tinyllava.model.build import load_tokenizer
from tinyllava.train import curve
from tinyllava.train.report import ProgressBar, RunLog, colour_tokens, length_histogram, parts_table, read_metrics
from tinyllava.train.tune import Tuned


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to="none")


def state_at(step: int, main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=1000, epoch=step / 100, is_world_process_zero=main)


def train(log: RunLog, args: TrainingArguments, start: int, steps: int, loss=lambda step: 1 / step) -> None:
    """Steps `start` + 1 ... `steps` as the Trainer reports them: a log every second step, a save every fourth."""
    log.on_train_begin(args, state_at(start), TrainerControl())
    for step in range(start + 1, steps + 1):
        if step % 2 == 0:
            log.on_log(
                args, state_at(step), TrainerControl(), logs={"loss": loss(step), "lr/llm": 1e-3, "grad_norm": 1.0}
            )
        if step % 4 == 0:
            log.on_log(args, state_at(step), TrainerControl(), logs={"eval_loss": 2 / step})
            log.on_save(args, state_at(step), TrainerControl())


# -- metrics.jsonl and curve.png ---------------------------------------------------------------------------------------


def test_a_resumed_run_reads_as_an_undisturbed_one(tmp_path: Path, args: TrainingArguments) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(RunLog(whole), args, 0, 16)
    train(RunLog(killed), args, 0, 10)
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # torn by the kill
    train(RunLog(killed), args, 8, 16)  # goes on from its last save

    ours, expected = read_metrics(killed / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    assert [{**line, "time": 0} for line in ours] == [{**line, "time": 0} for line in expected]
    times = [line["time"] for line in ours]
    assert times == sorted(times)
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == len(expected)


def test_a_fresh_start_keeps_nothing_of_an_earlier_run(tmp_path: Path, args: TrainingArguments) -> None:
    for losses in (5.0, 7.0):
        train(RunLog(tmp_path), args, 0, 4, lambda step, loss=losses: loss)
    assert {line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line} == {7.0}


def test_a_save_closes_a_line_of_the_log(tmp_path: Path, args: TrainingArguments) -> None:
    control = TrainerControl(should_save=True, should_log=False)
    RunLog(tmp_path).on_step_end(args, state_at(3), control)
    assert control.should_log


def test_what_is_no_number_is_null(tmp_path: Path, args: TrainingArguments) -> None:
    train(RunLog(tmp_path), args, 0, 2, lambda step: float("nan"))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["loss"] is None


def test_only_the_main_process_writes(tmp_path: Path, args: TrainingArguments) -> None:
    log = RunLog(tmp_path / "stage")
    log.on_train_begin(args, state_at(0, main=False), TrainerControl())
    log.on_log(args, state_at(1, main=False), TrainerControl(), logs={"loss": 1.0})
    log.on_save(args, state_at(1, main=False), TrainerControl())
    assert not (tmp_path / "stage").exists()


def test_the_curve_is_a_picture_at_every_save(tmp_path: Path, args: TrainingArguments) -> None:
    train(RunLog(tmp_path), args, 0, 3)
    assert not (tmp_path / "curve.png").exists()
    train(RunLog(tmp_path), args, 0, 8)
    with Image.open(tmp_path / "curve.png") as image:
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # axes, lines and letters
    assert not list(tmp_path.glob("*.partial"))


def test_smoothing_starts_without_a_bias_and_follows() -> None:
    assert curve.smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    noisy = curve.smooth([1.0 + (-1) ** i for i in range(200)])
    assert abs(noisy[100:] - 1.0).max() < 0.1
    assert curve.series(
        [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}, {"step": 2, "loss": None}], "loss"
    ) == (
        [1],
        [2.0],
    )


# -- the progress bar --------------------------------------------------------------------------------------------------


def progress(
    args: TrainingArguments, console: Console, steps: int = 300, main: bool = True, every: float = 15.0
) -> None:
    bar = ProgressBar("finetune", every=every, console=console)
    bar.on_train_begin(args, state_at(0, main), TrainerControl())
    for step in range(1, steps + 1):
        bar.on_step_end(args, state_at(step, main), TrainerControl())
        if step % 10 == 0:
            logs = {"loss": 1.2345, "lr/llm": 1e-3, "lr/connector": 1e-3, "data_wait": 0.021}
            bar.on_log(args, state_at(step, main), TrainerControl(), logs=logs)
    bar.on_train_end(args, state_at(steps, main), TrainerControl())


def test_a_pipe_gets_a_few_whole_lines(args: TrainingArguments) -> None:
    file = io.StringIO()
    progress(args, Console(file=file, width=40))
    lines = file.getvalue().splitlines()
    assert len(lines) == 2  # the first numbers, and the end
    for fact in ("finetune", "step 300/1000", "loss 1.234", "lr 1.0e-03 ", "samples/s", "data wait 2.1 %", "left"):
        assert fact in lines[-1]


def test_a_terminal_gets_a_bar_and_its_cursor_back(args: TrainingArguments) -> None:
    file = io.StringIO()
    progress(args, Console(file=file, force_terminal=True, width=120, legacy_windows=False))
    written = file.getvalue()
    assert "300/1000" in written and "loss 1.234" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_other_processes_are_silent(args: TrainingArguments) -> None:
    file = io.StringIO()
    progress(args, Console(file=file), main=False)
    assert file.getvalue() == ""


# -- tables and tokens -------------------------------------------------------------------------------------------------


def shown(renderable: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_the_parts_table_adds_up_and_names_each_rate() -> None:
    rows = [
        Tuned("vision_tower", "SiglipVisionModel", "frozen", None, 400_000_000, 0, "bfloat16"),
        Tuned("connector", "mlp2x_gelu", "full", 5e-4, 1_000, 1_000, "float32"),
        Tuned("llm", "PhiModel", "lora (r 128, alpha 256)", None, 2_600_000_000, 20_000_000, "bfloat16"),
    ]
    lines = [line.strip() for line in shown(parts_table(rows, lr=2e-5)).splitlines()]
    tower, connector, llm = (
        next(line for line in lines if line.startswith(part)) for part in ("vision", "connector", "llm")
    )
    total = lines.index(next(line for line in lines if line.startswith("total")))
    assert "400.0 M" in tower and " - " in tower and "2e-05" not in tower
    assert "0.0005" in connector and "1,000" in connector
    assert "2e-05" in llm and "20.0 M" in llm and "lora" in llm
    assert "3.00 B" in lines[total] and "20.0 M" in lines[total] and "0.7 %" in lines[total + 1]
    assert "SiglipVisionModel" in shown(parts_table(rows, lr=2e-5), width=80)


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer that, like Llama's, keeps a word's space in the word and drops it where a text begins."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>"]
    bpe.train_from_iterator(
        ["USER: what is it? ASSISTANT: a red cat\n."] * 9, trainers.BpeTrainer(special_tokens=specials)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    add_image_token(made)
    return made


def bytelevel() -> PreTrainedTokenizerFast:
    spec = LLMSpec(config=LLAMA, tokenizer={"vocab_size": 300})
    made = load_tokenizer(spec, Template.load("llama"), list)
    add_image_token(made)
    return made


@pytest.mark.parametrize("tokenizer", [sentencepiece(), bytelevel()], ids=["sentencepiece", "bytelevel"])
def test_green_is_what_the_loss_sees(tokenizer: PreTrainedTokenizerFast) -> None:
    record = {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}]}
    record["conversations"] += [{"from": "gpt", "value": "a red cat"}, {"from": "human", "value": "what?"}]
    record["conversations"] += [{"from": "gpt", "value": "it"}]
    encoded = Template.load("llama").encode(Sample.from_llava(record), tokenizer)
    image = image_token_id(tokenizer)
    at = encoded["input_ids"].index(image)
    ids = encoded["input_ids"][:at] + [image] * 9 + encoded["input_ids"][at + 1 :]
    labels = encoded["labels"][:at] + [IGNORE] * 9 + encoded["labels"][at + 1 :]

    text = colour_tokens(ids, labels, tokenizer, image)
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == [" a red cat</s>", " it</s>"]
    assert "USER: <image x 9>" in text.plain and text.plain.count("<image") == 1
    if "\n" in tokenizer.decode(ids):
        assert "↵\n" in text.plain


def test_pictures_side_by_side_are_told_apart() -> None:
    tokenizer = bytelevel()
    image = image_token_id(tokenizer)
    assert colour_tokens([image] * 6, [IGNORE] * 6, tokenizer, image).plain == "<image x 6>"
    assert colour_tokens([image] * 6, [IGNORE] * 6, tokenizer, image, [3, 3]).plain == "<image x 3><image x 3>"


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [1, 2, 3, 3], list(range(10, 2000, 7))])
def test_a_histogram_counts_every_sample_once(lengths: list[int]) -> None:
    lines = length_histogram(lengths, width=30).splitlines()
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines) == len(lengths)
    assert len(lines) <= 10
    assert max(line.count("█") for line in lines) == 30
    assert str(min(lengths)) in lines[0] and (
        len(lengths) == 1 or lengths[-1] <= int(lines[-1].split("  ")[-2].split()[-1])
    )
