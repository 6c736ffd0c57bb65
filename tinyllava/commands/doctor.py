"""`tinyllava doctor`: versions, devices and known problems of this machine. Paste its output into a bug report."""

import importlib
import os
import shutil
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from tinyllava.cache import find_cache_root
from tinyllava.commands.verify import verify_checkpoints
from tinyllava.provenance import get_versions

DISTRIBUTION = "tinyllava-factory"
GIB = 2**30


def diagnose(console: Console, checkpoint: str | None = None) -> bool:
    """Print facts about this machine and its known problems, or about a checkpoint; returns whether all is well."""
    if checkpoint is not None:
        return verify_checkpoints(checkpoint, console)
    facts = Table(show_header=False, box=None)
    for name, fact in {**get_versions(), **list_devices(), **list_resources(), **list_extras()}.items():
        facts.add_row(name, fact)
    console.print(facts, highlight=False)
    problems = find_problems()
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


def find_existing(path: Path) -> Path:
    """Return `path`, or the nearest directory above it that exists."""
    return path if path.exists() else find_existing(path.parent)


def list_extras() -> dict[str, str]:
    """List each optional group of packages, whether it is installed, and what is missing."""
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
        state[f"extra {extra}"] = f"not installed ({', '.join(missing)})" if missing else "installed"
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
