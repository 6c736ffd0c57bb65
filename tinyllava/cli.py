"""The command line: one function for each command.

torch and transformers are imported inside the functions, so that `--help` and `list` are fast.

Exit codes: 0 success, 1 a check found problems (`data check`, `data prepare`, `doctor`), 2 an error that the user can
correct (one or two lines on stderr; `--debug` adds the traceback), 75 a signal stopped a run that the same command
resumes, 130 Ctrl-C. docs/scale.md has the whole table.
"""

import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from tinyllava.commands.data_cache import show_cache
from tinyllava.console import guard_tracebacks, is_main_process, messages, output, show_error, show_log, show_traceback
from tinyllava.errors import Interrupted, UserError
from tinyllava.failures import describe_failure
from tinyllava.interrupt import RESTART, catch_signals

app = typer.Typer(
    help="Build, train, evaluate and chat with small vision-language models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Download datasets, check them before training, and see the cache.", no_args_is_help=True)
app.add_typer(data_app, name="data")
data_app.command("cache")(show_cache)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A name from `tinyllava list recipes`, or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Replace values: stages.finetune.trainer.learning_rate=1e-4"),
]
Checkpoint = Annotated[
    str,
    typer.Argument(metavar="CHECKPOINT", help="A checkpoint, a stage, a run, USER/NAME on the Hub, or `nano`."),
]
KeyValues = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="A value missing in an original TinyLLaVA checkpoint: template=phi"),
]
TASKS = "A name from `tinyllava list benchmarks`, a variant (textvqa-no-ocr), a .jsonl file, or your module:Class."
Judge = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The model that grades MM-Vet, served at OPENAI_BASE_URL, or a file of grades."),
]
DataRoot = Annotated[str | None, typer.Option("--data", metavar="ROOT", help="The directory of the benchmark data.")]


@app.callback()
def declare_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show --debug in --help. `main` removes it from the arguments, so that it works before and after the command."""
    guard_tracebacks()  # only now: typer sets a hook of its own


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output", help="The directory of the run. Default: runs/RECIPE.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in that directory.")] = False,
    data: DataRoot = None,
) -> None:
    """Train all stages of a recipe, then evaluate on the benchmarks in its `eval` list. Run it again to resume."""
    from tinyllava.commands.train import train_and_score

    train_and_score(recipe, overrides, output_dir, overwrite, data)


@app.command("look")
def preview_run(
    recipe: RecipeName,
    overrides: Overrides = None,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing: show tiny models instead.")] = False,
) -> None:
    """Show what training will do: coloured samples, parts, lengths, steps and memory. Trains nothing."""
    from tinyllava.config import load_recipe

    loaded = load_recipe(recipe, overrides)
    from tinyllava.commands.look import look_at_recipe, look_at_stand_ins

    (look_at_stand_ins if offline else look_at_recipe)(loaded, output)


@app.command()
def chat(
    checkpoint: Checkpoint,
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE", help="Images: files or URLs.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask one question and exit.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 512,
    lacking: KeyValues = None,
) -> None:
    """Chat with a checkpoint about images, or without any."""
    from tinyllava.commands.chat import answer_lines, answer_once
    from tinyllava.commands.keywords import parse_keywords
    from tinyllava.infer import Session

    session = Session.load(checkpoint, **parse_keywords(lacking))
    generation = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    if prompt is not None:
        answer_once(session, prompt, images or [], **generation)
    else:
        answer_lines(session, images or [], **generation)


@app.command("eval")
def evaluate_checkpoint(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, a stage, a run, USER/NAME, or `nano`.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help=TASKS + " Separate several with commas.")] = None,
    data: DataRoot = None,
    output_dir: Annotated[Path | None, typer.Option("--output", help="Default: the CHECKPOINT directory.")] = None,
    judge: Judge = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(metavar="A B", help="Compare two scored runs.")] = None,
    lacking: KeyValues = None,
) -> None:
    """Evaluate a checkpoint on benchmarks by their official rules, or compare two scored runs."""
    from tinyllava.commands.evaluate import ask_and_score, check_tasks, print_comparison, split_names
    from tinyllava.commands.keywords import parse_keywords

    names = split_names(tasks or "")
    if compare is not None:
        print_comparison(*compare, names)
    elif checkpoint is None or not names:
        raise UserError(
            "missing CHECKPOINT or --tasks. Use: tinyllava eval CHECKPOINT --tasks stamps,pope; or --compare A B."
        )
    else:
        folder = output_dir or Path(checkpoint)
        benchmarks = check_tasks(names, data, judge)
        ask_and_score(checkpoint, benchmarks, data, folder, judge, parse_keywords(lacking), together=True)


@app.command()
def score(
    task: Annotated[str, typer.Argument(metavar="TASK", help=TASKS)],
    answers: Annotated[Path, typer.Option(metavar="FILE", help="The answers, in our format or the original's.")],
    data: DataRoot = None,
    output_dir: Annotated[Path | None, typer.Option("--output", help="Default: FILE.scores, next to FILE.")] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Accept missing, repeated and unknown answers, and report them.")
    ] = False,
    judge: Judge = None,
) -> None:
    """Score a file of answers by the official rules, without a model."""
    from tinyllava.commands.score import score_and_show

    score_and_show(task, data, answers, output_dir, allow_partial, judge)


@app.command()
def export(
    checkpoint: Checkpoint,
    to: Annotated[
        str,
        typer.Option(
            help="merged: full weights. hf: with a model card. adapter: base and LoRA for vLLM. split: one part each."
        ),
    ],
    output_dir: Annotated[Path, typer.Option("--output", help="The directory to create.")],
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload to this model repository on the Hub.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="dtype of the weights: auto (unchanged), float32, bfloat16 or float16.")
    ] = "auto",
    lacking: KeyValues = None,
) -> None:
    """Write a checkpoint in another format."""
    from tinyllava.commands.export import export_and_show
    from tinyllava.commands.keywords import parse_keywords

    export_and_show(checkpoint, to, output_dir, push, dtype, parse_keywords(lacking))


@app.command("list")
def list_parts(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="List only this kind, such as recipes.")] = None,
) -> None:
    """List the parts, templates, tunings, recipes and benchmarks that a recipe can name."""
    from tinyllava.commands import parts
    from tinyllava.factory import KINDS

    for name in [kind] if kind else KINDS:
        parts.show_parts(name, output)


@data_app.command("check")
def check_data(
    source: Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="A recipe, or a file of annotations.")],
    images: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="Image directory of FILE. Repeatable.")
    ] = None,
) -> None:
    """Read all data once and report each problem with its place. Exits with 1 if there are problems."""
    from tinyllava.commands.check_data import check_source

    report = check_source(source, images)
    if not report.is_ok:
        output.print(report.make_table())
        raise typer.Exit(1)
    output.print(f"{report.describe_counts()}: nothing is wrong.", highlight=False)


@data_app.command("prepare")
def prepare_data(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Datasets such as llava-1.5 and pope. Without a name: list all."),
    ] = None,
    root: Annotated[
        Path, typer.Option(metavar="DIR", envvar="TINYLLAVA_DATA", help="The directory to download to.")
    ] = Path("data"),
    check: Annotated[bool, typer.Option("--check", help="Download nothing; only check the files.")] = False,
) -> None:
    """Download training data and benchmarks, or print where to get them. Exits with 1 if anything is missing."""
    from tinyllava.commands import prepare

    if not names:
        prepare.show_datasets(output)
    elif not prepare.prepare_datasets(names, root, not check, output):
        raise typer.Exit(1)


@app.command("doctor")
def run_doctor(
    checkpoint: Annotated[str | None, typer.Argument(metavar="CHECKPOINT")] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Record the settings that you edited as right.")] = False,
) -> None:
    """Check this machine, or all files of CHECKPOINT against their hashes. Exits with 1 if there is a problem."""
    from tinyllava.commands.doctor import diagnose

    if not diagnose(output, checkpoint, accept):
        raise typer.Exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Run the console script. Always raises SystemExit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug, arguments = "--debug" in arguments, [argument for argument in arguments if argument != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise each forked data worker warns about it
    os.environ.setdefault("TQDM_DELAY", "2")  # progress bars of libraries appear only for what takes longer
    show_log(main_process=is_main_process(), debug=debug)
    sys.exit(run_command(arguments, debug))


def run_command(arguments: list[str], debug: bool) -> int:
    """Run one command and return its exit code."""
    reason, resumes = "", arguments[:1] in (["train"], ["eval"])
    try:
        with catch_signals() if resumes else nullcontext():
            code = app(arguments, prog_name="tinyllava", standalone_mode=False) or 0
    except Interrupted as error:
        reason, code = str(error), error.code
    except typer.TyperException as error:  # a wrong command, option or value
        if text := error.format_message():  # empty if help was shown
            show_error(text)
        code = 2
    except UserError as error:
        if debug:
            show_traceback(error)
        show_error(str(error))
        code = 2
    except (OSError, RuntimeError) as error:
        text = None if debug else describe_failure(error)
        if text is None:
            raise
        show_error(text)
        code = 2
    if code == 130 and not reason:  # what typer returns after Ctrl-C
        reason = "interrupted."
    if reason and is_main_process():
        # Without --overwrite, which would delete what there is to resume.
        again = shlex.join(["tinyllava", *(argument for argument in arguments if argument != "--overwrite")])
        hint = f" To resume: {again}" if resumes and code in (RESTART, 130) else ""
        messages.print(f"\n{reason}{hint}", highlight=False, markup=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
