"""What `tinyllava doctor` tries out: two processes, the folder for runs, the Hub. Each has a time limit."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError

HERE = Path(__file__).parent
PROCESSES_LIMIT, FOLDER_LIMIT, HUB_LIMIT = 20.0, 15.0, 5.0  # seconds
SLACK = 3.0  # seconds that a probe may need beyond its own limit


@dataclass
class Finding:
    """The result of a probe: a fact, and the problem in it with its remedy, if there is one."""

    fact: str
    problem: str | None = None


def run_probes(runs: Path) -> dict[str, Finding]:
    """Run all probes at the same time. runs: the folder that runs are written to. A probe that hangs is left alone."""
    probes: dict[str, tuple[Callable[[], Finding], float]] = {
        "two processes": (lambda: try_processes("gloo"), PROCESSES_LIMIT),
        "output folder": (lambda: try_output(runs), FOLDER_LIMIT),
        "Hub": (try_hub, HUB_LIMIT),
    }
    if torch.cuda.device_count() > 1 and dist.is_available() and dist.is_nccl_available():
        probes["two GPUs"] = (lambda: try_processes("nccl"), PROCESSES_LIMIT)
    findings: dict[str, Finding] = {}

    def store(name: str, probe: Callable[[], Finding]) -> None:
        try:
            findings[name] = probe()
        except (OSError, RuntimeError) as error:  # no process can be started, or no port of this machine opened
            reason = str(error).strip().partition("\n")[0][:200]
            findings[name] = Finding(
                "cannot be tried", f"{name}: {reason}. Check the limits and the network of this user"
            )

    threads = {name: Thread(target=store, args=(name, probe), daemon=True) for name, (probe, _) in probes.items()}
    start = time.monotonic()
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        limit = probes[name][1]
        thread.join(max(0.0, start + limit + SLACK - time.monotonic()))
        findings.setdefault(name, Finding(f"no answer in {limit:.0f} s"))
    return {name: findings[name] for name in probes}


def try_processes(backend: str) -> Finding:
    """Start two processes, as torchrun does, and let them add a number."""
    if not dist.is_available():
        return Finding("this torch was built without torch.distributed")
    start = time.monotonic()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-P", str(HERE / "two_processes.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [*command, str(rank), backend, str(store.port)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        reasons = []
        for child in children:
            _, errors = child.communicate(timeout=max(0.1, start + PROCESSES_LIMIT - time.monotonic()))
            if child.returncode:
                reasons.append(errors.strip().rpartition("\n")[2][:200] or f"exit code {child.returncode}")
    except subprocess.TimeoutExpired:
        return Finding(f"{backend}: not ready in {PROCESSES_LIMIT:.0f} s; this machine may be busy")
    finally:
        for child in children:
            child.kill()
    if reasons:
        variable = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}[backend]
        remedy = f"Training with torchrun would fail. Set {variable} to a network interface of this machine, such as lo"
        return Finding(f"{backend} fails", f"two processes cannot exchange data over {backend}: {reasons[0]}. {remedy}")
    return Finding(f"{backend} works ({time.monotonic() - start:.1f} s)")


def try_output(folder: Path) -> Finding:
    """Write to a folder and lock a file in it."""
    command = [sys.executable, "-P", str(HERE / "try_folder.py"), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        answer = json.loads(process.communicate(timeout=FOLDER_LIMIT)[0] or '{"error": "the process stopped"}')
    except subprocess.TimeoutExpired:
        process.kill()  # it is not waited for: a process in a network folder that hangs cannot be killed
        answer = {"error": f"no answer in {FOLDER_LIMIT:.0f} s"}
    if "error" in answer:
        return Finding(
            f"{folder}: {answer['error']}",
            f"cannot write to {folder}: {answer['error']}. Choose another --output for `tinyllava train`",
        )
    fact = f"{folder}: {answer['speed']:,.0f} MB/s written; file locks {answer['locks']}"
    if answer["locks"] == "work":
        return Finding(fact)
    remedy = "A second run in one --output could not be refused. Choose another disk, or mount this one with locks"
    return Finding(fact, f"file locks in {folder} {answer['locks']}. {remedy}")


def try_hub() -> Finding:
    """Ask the Hub, or the mirror in $HF_ENDPOINT, for an answer."""
    if constants.HF_HUB_OFFLINE:
        return Finding("not tried, because HF_HUB_OFFLINE is set")
    host = read_host(constants.ENDPOINT)
    if host is None:
        return Finding("cannot be reached: HF_ENDPOINT is not the address of a server, such as https://huggingface.co")
    start = time.monotonic()
    try:
        status = get_session().head(constants.ENDPOINT, timeout=HUB_LIMIT, follow_redirects=True).status_code
    except (HTTPError, OSError, ValueError) as error:
        reason = re.sub(r"\S*@\S*", host, str(error).strip())[:100] or type(error).__name__
        return Finding(f"{host} cannot be reached: {reason}")
    if status >= 500 or status == 407:  # 407: of a proxy
        return Finding(f"{host} answers with the error {status}")
    return Finding(f"{host} answers ({time.monotonic() - start:.1f} s)")


def read_host(address: str) -> str | None:
    """The host in an HTTP address, without a user and a password; None for any other text."""
    try:
        parts = urlsplit(address)
        is_valid = parts.scheme in ("http", "https") and address.isascii() and address.isprintable()
        return parts.hostname if is_valid and parts.port != 0 else None
    except ValueError:
        return None
