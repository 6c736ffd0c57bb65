"""The command line: one function a command. torch is imported inside them, so that help and `list` are quick.

Exit codes: 0 done, 1 the answer is no (`data check`, `doctor`), 2 something in the user's hands is wrong (one or two
lines on stderr; `--debug` adds the traceback), 130 interrupted.
"""

import errno
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tinyllava.console import messages, output, show_error, show_log
from tinyllava.errors import UserError
from tinyllava.factory import Factory

INTERRUPTED = 130

app = typer.Typer(
    help="Build, train, score and talk to small vision-language models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look into data before training does.", no_args_is_help=True)
app.add_typer(data_app, name="data")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe of `tinyllava list recipes`, or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Replace values: stages.finetune.trainer.learning_rate=1e-4"),
]
Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run such as runs/quickstart.")
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
    needs_data(loaded.eval, data)
    from tinyllava.train import stage
    from tinyllava.train.record import is_main_process

    run_dir = output_dir or Path("runs") / name
    final = stage.run(loaded, name, run_dir, overwrite=overwrite)
    if not is_main_process():
        return
    if loaded.eval:
        score(final, loaded.eval, data, run_dir)
    output.print(f"\ntalk to it   tinyllava chat {shlex.quote(str(run_dir))}", highlight=False, soft_wrap=True)
    output.print(f"the weights  {final}", highlight=False, soft_wrap=True)


def needs_data(tasks: list[str], root: str | None) -> None:
    """Raise UserError for a benchmark whose data are nowhere: before training, not after."""
    for task in tasks:
        if root is None and not hasattr(Factory("benchmarks").get(task), "locate"):
            raise UserError(
                f"{task} needs its data: give --data ROOT. (`tinyllava list benchmarks` says what each is.)"
            )


def score(checkpoint: Path, tasks: list[str], root: str | None, folder: Path) -> None:
    """Ask and score a checkpoint, and show the table and where the sample answers lie."""
    from tinyllava.eval.run import evaluate, print_scores
    from tinyllava.infer import Session

    results = evaluate(Session.load(checkpoint), tasks, root, folder)
    print_scores(results, output)
    for task in tasks:
        page = folder / "eval" / task / "samples.html"
        output.print(f"{task}: sample answers with their pictures in {page}", highlight=False, soft_wrap=True)


@app.command()
def look(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Show what training would do: coloured samples, parts, lengths, steps. Reads no weights."""
    from tinyllava.config import load_recipe

    loaded = load_recipe(recipe, overrides)
    from tinyllava.train.look import look

    look(loaded, output)


@app.command()
def chat(
    checkpoint: Checkpoint,
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE", help="Pictures: files or URLs.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this once, and leave.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
) -> None:
    """Talk to a checkpoint about pictures, or about nothing in particular."""
    from tinyllava.commands.chat import say, talk
    from tinyllava.infer import Session

    session = Session.load(checkpoint)
    generation = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    if prompt is not None:
        say(session, prompt, images or [], **generation)
    else:
        talk(session, images or [], **generation)


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    tasks: Annotated[str, typer.Option(help="Benchmarks of `tinyllava list benchmarks`, with commas between.")],
    data: DataRoot = None,
    output_dir: Annotated[Path | None, typer.Option("--output", help="By default the CHECKPOINT's directory.")] = None,
) -> None:
    """Ask a checkpoint a benchmark's questions and score its answers by the official rules."""
    named = [task.strip() for task in tasks.split(",") if task.strip()]
    needs_data(named, data)
    score(Path(checkpoint), named, data, output_dir or Path(checkpoint))


@app.command()
def export(
    checkpoint: Checkpoint,
    to: Annotated[str, typer.Option(help="merged: the adapter folded into the weights.")],
    output_dir: Annotated[Path, typer.Option("--output", help="A directory that does not exist yet.")],
) -> None:
    """Write a checkpoint in another form."""
    if to != "merged":
        raise UserError(f"unknown form '{to}'. Known: merged.")
    if output_dir.exists():
        raise UserError(f"{output_dir} exists already. Choose another --output, or remove it.")
    from tinyllava.infer import find_checkpoint
    from tinyllava.model import checkpoint as files
    from tinyllava.model.adapter import merge

    source = find_checkpoint(checkpoint)
    model, processor, template, record = files.load(source)
    merged = merge(model)
    with files.aside(output_dir) as directory:
        files.save(merged, processor, template, directory, {**record.get("run", {}), "merged_from": source.name})
    reason = files.why_not_plain(merged)
    output.print(f"{output_dir}: {'plain llava' if reason is None else f'not plain llava: {reason}'}", highlight=False)


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


@app.command()
def doctor() -> None:
    """Show versions, devices, memory and disk, and what is known not to work; exits with 1 if anything is."""
    from tinyllava.commands.doctor import doctor

    if not doctor(output):
        raise typer.Exit(1)


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
