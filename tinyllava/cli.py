"""The command line: one function a command. torch is imported inside them, so that help and `list` are quick.

Exit codes: 0 done, 1 the answer is no (`data check`, `doctor`), 2 something in the user's hands is wrong (one or two
lines on stderr; `--debug` adds the traceback), 130 interrupted.
"""

import errno
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyllava.console import messages, output, show_error, show_log
from tinyllava.errors import UserError

INTERRUPTED = 130

app = typer.Typer(
    help="Build, train, score and talk to small vision-language models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Get data, and look into them before training does.", no_args_is_help=True)
app.add_typer(data_app, name="data")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe of `tinyllava list recipes`, or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Replace values: stages.finetune.trainer.learning_rate=1e-4"),
]
Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, a run such as runs/quickstart, or nano.")
]
Lacking = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="What a checkpoint of the original does not carry: template=phi"),
]
TASKS = "Benchmarks of `tinyllava list benchmarks`, with variants such as textvqa-no-ocr; or your own .jsonl."
Judge = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Who grades MM-Vet, behind OPENAI_BASE_URL; or a file of grades.")
]
DataRoot = Annotated[str | None, typer.Option("--data", metavar="ROOT", help="The folder of the benchmarks' data.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. Goes anywhere.")] = False,
):
    """Main takes --debug out of the arguments, wherever it stands; it is declared here for --help."""


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output", help="The run's directory; by default runs/RECIPE.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete what an earlier run left there.")] = False,
    data: DataRoot = None,
) -> None:
    """Train all stages of a recipe, then score what its `eval` names. Run it again to continue an interrupted run."""
    from tinyllava.config import load_recipe

    loaded, name = load_recipe(recipe, overrides), Path(recipe).stem
    from tinyllava.commands.evaluate import ask_and_score, checked

    tasks = checked(loaded.eval, data)
    from tinyllava.train import stage
    from tinyllava.train.record import is_main_process

    run_dir = output_dir or Path("runs") / name
    final = stage.run(loaded, name, run_dir, overwrite=overwrite)
    if not is_main_process():
        return
    if tasks:
        ask_and_score(final, tasks, data, run_dir)
    output.print(f"\ntalk to it   tinyllava chat {shlex.quote(str(run_dir))}", highlight=False, soft_wrap=True)
    output.print(f"the weights  {final}", highlight=False, soft_wrap=True)


@app.command()
def look(
    recipe: RecipeName,
    overrides: Overrides = None,
    offline: Annotated[bool, typer.Option("--offline", help="With tiny stand-ins: needs no Hub and no data.")] = False,
) -> None:
    """Show what training would do: coloured samples, parts, lengths, steps. Reads no weights."""
    from tinyllava.config import load_recipe

    loaded = load_recipe(recipe, overrides)
    from tinyllava.train.look import look, look_offline

    (look_offline if offline else look)(loaded, output)


@app.command()
def chat(
    checkpoint: Checkpoint,
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE", help="Pictures: files or URLs.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this once, and leave.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    lacking: Lacking = None,
) -> None:
    """Talk to a checkpoint about pictures, or about nothing in particular."""
    from tinyllava.commands.chat import say, talk
    from tinyllava.infer import Session

    session = Session.load(checkpoint, **given(lacking))
    generation = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    if prompt is not None:
        say(session, prompt, images or [], **generation)
    else:
        talk(session, images or [], **generation)


@app.command("eval")
def evaluate(
    checkpoint: Annotated[str | None, typer.Argument(metavar="CHECKPOINT", help="Or a run, like runs/a.")] = None,
    tasks: Annotated[str | None, typer.Option(help=TASKS + " Commas between.")] = None,
    data: DataRoot = None,
    output_dir: Annotated[Path | None, typer.Option("--output", help="By default the CHECKPOINT's directory.")] = None,
    judge: Judge = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Ask nothing: do these two scored runs differ?")
    ] = None,
    lacking: Lacking = None,
) -> None:
    """Ask a checkpoint a benchmark's questions and score its answers by the official rules; or compare two."""
    from tinyllava.commands.evaluate import ask_and_score, checked, print_comparison, split

    names = split(tasks or "")
    if compare is not None:
        print_comparison(*compare, names)
    elif checkpoint is None or not names:
        raise UserError("say what to ask whom: tinyllava eval CHECKPOINT --tasks stamps,pope; or --compare A B.")
    else:
        found = checked(names, data, judge)
        folder = output_dir or Path(checkpoint)
        ask_and_score(checkpoint, found, data, folder, judge, given(lacking), together=True)


@app.command()
def score(
    task: Annotated[str, typer.Argument(metavar="TASK", help=TASKS)],
    answers: Annotated[Path, typer.Option(metavar="FILE", help="Ours or the original's: any form there is.")],
    data: DataRoot = None,
    output_dir: Annotated[Path | None, typer.Option("--output", help="By default FILE.scores, beside it.")] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Record missing, repeated and unknown answers; do not refuse.")
    ] = False,
    judge: Judge = None,
) -> None:
    """Score an answers file by the official rules, without a model."""
    from tinyllava.commands.score import score_and_show

    score_and_show(task, data, answers, output_dir, allow_partial, judge)


@app.command()
def export(
    checkpoint: Checkpoint,
    to: Annotated[
        str, typer.Option(help="merged: adapter folded in. hf: with a model card, for the Hub. split: parts apart.")
    ],
    output_dir: Annotated[Path, typer.Option("--output", help="A directory that does not exist yet.")],
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Upload to this model on the Hub.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (as they are), float32, bfloat16, float16.")
    ] = "auto",
    lacking: Lacking = None,
) -> None:
    """Write a checkpoint in another form."""
    from tinyllava.commands import export as forms

    reason = forms.export(checkpoint, to, output_dir, push or output_dir.name, dtype, given(lacking))
    if to == "split":
        for part in ("llm", "vision_tower", "connector"):
            output.print(f"{output_dir}/{part}", highlight=False, soft_wrap=True)
    else:
        kind = "plain llava" if reason is None else f"not plain llava: {reason}"
        output.print(f"{output_dir}: {kind}", highlight=False, soft_wrap=True)
    if push:
        output.print(f"uploaded to {forms.push(output_dir, push)}", highlight=False, soft_wrap=True)


@app.command("list")
def list_parts(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="Only this kind, like recipes.")] = None,
) -> None:
    """Show every part, template, tuning, recipe and benchmark that a recipe can name."""
    from tinyllava.commands import parts

    for one in [kind] if kind else parts.kinds():
        parts.show(one, output)


@data_app.command("check")
def data_check(
    source: Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="A recipe, or an annotation file.")],
    images: Annotated[list[str] | None, typer.Option(metavar="DIR", help="Where a file's pictures lie.")] = None,
) -> None:
    """Read everything once and report what is wrong where; exits with 1 if anything is."""
    from tinyllava.commands.check import check_source

    report = check_source(source, images)
    if not report.ok:
        output.print(report.table())
        raise typer.Exit(1)
    counts = f"{report.records:,} records, {report.pictures:,} pictures, {report.text_only:,} records without a picture"
    output.print(f"{counts}: nothing is wrong.", highlight=False)


@data_app.command("prepare")
def data_prepare(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="llava-1.5, pope, ...; without any, what there is.")
    ] = None,
    root: Annotated[
        Path, typer.Option(metavar="DIR", envvar="TINYLLAVA_DATA", help="Where data lie, or are to lie.")
    ] = Path("data"),
    check: Annotated[bool, typer.Option("--check", help="Fetch nothing: only look at what is there.")] = False,
) -> None:
    """Get training data and benchmarks, or say where they are to be had; exits with 1 while anything lacks."""
    from tinyllava.commands import prepare

    if not names:
        prepare.show(output)
    elif not prepare.prepare(names, root, not check, output):
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Show versions, devices, memory and disk, and what is known not to work; exits with 1 if anything is."""
    from tinyllava.commands.doctor import doctor

    if not doctor(output):
        raise typer.Exit(1)


def given(lacking: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE options as keywords of `tinyllava.load`; a value is YAML, or the path of a JSON or YAML file."""
    import yaml

    keywords = {}
    for pair in lacking or []:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"cannot read --lacking '{pair}': expected KEY=VALUE, like template=phi.")
        is_file = text.endswith((".json", ".yaml", ".yml"))
        if is_file and not Path(text).is_file():
            raise UserError(f"--lacking {key}: file {text} not found.")
        keywords[key] = yaml.safe_load(Path(text).read_text(encoding="utf-8") if is_file else text)
    return keywords


def main(arguments: list[str] | None = None) -> None:
    """The console script. Always raises SystemExit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug, arguments = "--debug" in arguments, [argument for argument in arguments if argument != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or each forked data worker warns about it
    os.environ.setdefault("TQDM_DELAY", "2")  # the libraries' own bars appear only where there is something to wait for
    show_log(main_process=int(os.environ.get("RANK", 0)) == 0, debug=debug)
    sys.exit(run(arguments, debug))


def run(arguments: list[str], debug: bool) -> int:
    """Run one command and return its exit code."""
    try:
        code = app(arguments, prog_name="tinyllava", standalone_mode=False) or 0
    except typer.TyperException as error:  # of the command line itself
        if text := error.format_message():  # empty where help was shown instead
            show_error(text)
        code = 2
    except UserError as error:
        if debug:
            messages.print_exception()
        show_error(str(error))
        code = 2
    except OSError as error:
        if debug or error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}:
            raise
        show_error(f"{error.strerror}: {error.filename or 'while writing'}.")
        code = 2
    if code == INTERRUPTED:  # typer makes it of Ctrl-C
        again = shlex.join(["tinyllava", *(argument for argument in arguments if argument != "--overwrite")])
        resumes = arguments[:1] in (["train"], ["eval"])
        hint = f" To continue: {again}" if resumes else ""
        messages.print(f"\ninterrupted.{hint}", highlight=False, markup=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
