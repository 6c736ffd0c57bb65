"""Find the device and the dtype for a name."""

import os

import torch

from tinyllava.errors import UserError
from tinyllava.model.parts import DTYPES


def find_device(name: str | torch.device | None) -> torch.device:
    """The device `name`. By default the accelerator (with torchrun, one for each process), else the CPU."""
    default = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    known = sorted({"cpu", default.type})
    kind, _, index = str(name or default).partition(":")
    if kind not in known or not (index or "0").isdigit():
        raise UserError(f"no device '{name}' on this machine. It has: {', '.join(known)}.")
    if name is None and default.type != "cpu" and "LOCAL_RANK" in os.environ:
        return torch.device(default.type, int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
    return torch.device(name or default)


def find_dtype(name: str | torch.dtype) -> str | torch.dtype:
    """The dtype `name`, or auto. Raises UserError for anything that weights cannot have."""
    if not getattr(name, "is_floating_point", isinstance(name, str) and name in DTYPES):
        raise UserError(f"unknown dtype '{name}'. Known: {', '.join(DTYPES)}.")
    return DTYPES.get(name, name)
