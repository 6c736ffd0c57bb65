"""`tinyllava doctor`: versions, devices and known problems of this machine. Paste its output into a bug report.

`tinyllava doctor CHECKPOINT` compares the files of a checkpoint with their hashes (verify.py).
"""

import importlib
import os
import shutil
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_torch_flex_attn_available

from tinyllava.cache import find_cache_root
from tinyllava.commands.probes import run_probes
from tinyllava.commands.verify import verify_checkpoints
from tinyllava.console import messages
from tinyllava.errors import UserError
from tinyllava.provenance import get_versions

DISTRIBUTION = "tinyllava-factory"
GIB = 2**30
EXTRAS = {  # what each gives. No code of ours uses an extra that is not here
    "deepspeed": "ZeRO-2 and ZeRO-3 on several GPUs",
    "qlora": "QLoRA, and loading in 4 or 8 bits",
    "gguf": "LLMs from GGUF files",
    "wandb": "curves in Weights & Biases",
    "trackio": "curves in Trackio",
    "judge": "MM-Vet, graded by another model",
    "lmms-eval": "the benchmarks of lmms-eval",
    "dev": "the tests of this package",
}


def diagnose(console: Console, checkpoint: str | None = None, accept: bool = False) -> bool:
    """Print facts about this machine and its known problems, or about a checkpoint; returns whether all is well.

    accept: record the settings of the checkpoint that the user has edited as right.
    """
    if checkpoint is not None:
        return verify_checkpoints(checkpoint, console, accept)
    if accept:
        raise UserError("--accept needs a checkpoint. Use: tinyllava doctor CHECKPOINT --accept.")
    with messages.status("trying two processes, the output folder and the Hub"):
        findings = run_probes(find_existing(Path.cwd() / "runs"))
    tried = {name: finding.fact for name, finding in findings.items()}
    attention = {"attention": describe_attention()}
    facts = Table(show_header=False, box=None)
    for name, fact in {**get_versions(), **list_devices(), **attention, **list_resources(), **tried}.items():
        facts.add_row(name, escape(fact))
    for name, state in list_extras().items():
        facts.add_row(f"extra {name}", f"{state}: {EXTRAS.get(name, 'no command uses it yet')}")
    console.print(facts, highlight=False)
    console.print(f'Install an extra with: pip install "{DISTRIBUTION}\\[NAME]"', highlight=False)
    problems = [*find_problems(), *(escape(finding.problem) for finding in findings.values() if finding.problem)]
    for problem in problems:
        console.print(f"[red]problem:[/] {problem}", highlight=False, soft_wrap=True)
    console.print("" if problems else "[green]no known problems[/]")
    return not problems


def list_devices() -> dict[str, str]:
    """List the accelerators that torch can use."""
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return {f"GPU {index}": f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" for index, gpu in enumerate(gpus)}
    if torch.backends.mps.is_available():
        return {"GPU": "Apple (mps)"}
    return {"GPU": f"none that torch {torch.__version__} can use"}


def list_resources() -> dict[str, str]:
    """List CPU cores, memory, and the free disk space for runs and for the cache."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    places = {"disk here": Path.cwd(), "disk of the cache": find_existing(find_cache_root())}
    free = {name: f"{shutil.disk_usage(path).free / GIB:.0f} GiB free ({path})" for name, path in places.items()}
    return {"CPU": f"{os.cpu_count()} cores, {total / GIB:.0f} GiB memory", **free}


def describe_attention() -> str:
    """The implementations that `attn_implementation` can name here."""
    flash = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    names = ["sdpa", "eager", *["flex_attention"] * is_torch_flex_attn_available()]
    names += [name for name, is_available in flash.items() if is_available()]
    if "flash_attention_2" in names:
        return ", ".join(names)
    reason = "flash-attn is not installed" if torch.cuda.is_available() else "no GPU that it runs on"
    return f"{', '.join(names)}; not flash_attention_2: {reason}"


def find_existing(path: Path) -> Path:
    """Return `path`, or the nearest directory above it that exists."""
    return path if path.exists() else find_existing(path.parent)


def list_extras() -> dict[str, str]:
    """List each optional group of packages, and whether it is installed."""
    state = {}
    for extra in metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
        conditional = [
            requirement
            for requirement in list_requirements()
            if requirement.marker and requirement.marker.evaluate({"extra": extra})
        ]
        # A requirement whose marker also holds without the extra does not belong to it.
        names = [requirement.name for requirement in conditional if not requirement.marker.evaluate({"extra": ""})]
        missing = [name for name in names if not get_installed_version(name)]
        state[extra] = "not installed" if missing else "installed"
    return state


def list_requirements() -> list[Requirement]:
    """List the requirements of the package and of its extras."""
    return [Requirement(text) for text in requires(DISTRIBUTION) or []]


def get_installed_version(name: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_problems() -> list[str]:
    """Find packages that are known not to work together; returns each problem with its remedy."""
    problems = []
    for requirement in list_requirements():
        present = get_installed_version(requirement.name)
        if present and not requirement.specifier.contains(present, prereleases=True):
            problems.append(
                f"{requirement.name} {present} is installed, but {requirement.specifier} is required:"
                f' pip install "{requirement}"'
            )
    if get_installed_version("torchvision"):
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError) as error:
            # "operator torchvision::nms does not exist": the CUDA build on PyPI fails together with a CPU build of
            # torch, and then transformers fails when it imports torchvision.
            reason = str(error).splitlines()[0]
            problems.append(f"torchvision does not fit torch {torch.__version__} ({reason}): pip uninstall torchvision")
    elif get_installed_version("timm"):
        problems.append("timm without torchvision breaks `accelerate launch`: pip uninstall timm")
    return problems
