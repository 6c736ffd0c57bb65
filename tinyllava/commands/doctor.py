"""`tinyllava doctor`: what this machine has, and what on it is known not to work. Paste it into a bug report."""

import importlib
import os
import shutil
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from tinyllava.data.cache import cache_root
from tinyllava.train.record import versions

DISTRIBUTION = "tinyllava-factory"
GIB = 2**30


def doctor(console: Console) -> bool:
    """Print what there is; True when nothing known to be bad was found."""
    facts = Table(show_header=False, box=None)
    for name, found in {**versions(), **devices(), **memory(), **extras()}.items():
        facts.add_row(name, found)
    console.print(facts, highlight=False)
    found = problems()
    for problem in found:
        console.print(f"[red]problem:[/] {problem}", highlight=False, soft_wrap=True)
    console.print("" if found else "[green]nothing is known to be wrong here[/]")
    return not found


def devices() -> dict[str, str]:
    """Accelerators as torch sees them."""
    if torch.cuda.is_available():
        seen = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return {f"GPU {i}": f"{one.name}, {one.total_memory / GIB:.0f} GiB" for i, one in enumerate(seen)}
    if torch.backends.mps.is_available():
        return {"GPU": "Apple (mps)"}
    return {"GPU": f"none that torch {torch.__version__} can use"}


def memory() -> dict[str, str]:
    """CPU cores, memory, and the free disk where runs and prepared data lie."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    places = {"disk here": Path.cwd(), "disk of the cache": existing(cache_root())}
    free = {name: f"{shutil.disk_usage(path).free / GIB:.0f} GiB free ({path})" for name, path in places.items()}
    return {"CPU": f"{os.cpu_count()} cores, {total / GIB:.0f} GiB memory", **free}


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return path if path.exists() else existing(path.parent)


def extras() -> dict[str, str]:
    """Which optional groups of packages are installed in full."""
    state = {}
    for extra in metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
        needed = [one for one in requirements() if one.marker and one.marker.evaluate({"extra": extra})]
        missing = [one.name for one in needed if not one.marker.evaluate({"extra": ""}) and not installed(one.name)]
        state[f"extra {extra}"] = f"not installed ({', '.join(missing)})" if missing else "installed"
    return state


def requirements() -> list[Requirement]:
    """What the package asks for, extras included."""
    return [Requirement(text) for text in requires(DISTRIBUTION) or []]


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def problems() -> list[str]:
    """Known bad combinations, each with its remedy."""
    found = []
    for one in requirements():
        have = installed(one.name)
        if have and not one.specifier.contains(have, prereleases=True):
            found.append(f'{one.name} {have} is installed, but {one.specifier} is needed: pip install "{one}"')
    if installed("torchvision"):
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError) as error:
            # "operator torchvision::nms does not exist": PyPI's is a CUDA build, and transformers breaks with it
            reason = str(error).splitlines()[0]
            found.append(f"torchvision does not fit torch {torch.__version__} ({reason}): pip uninstall torchvision")
    elif installed("timm"):
        found.append("timm without torchvision breaks `accelerate launch`: pip uninstall timm")
    return found
