"""One of two processes that add a number over torch.distributed: `tinyllava doctor` runs this file twice.

python two_processes.py RANK BACKEND PORT

It exits with 0 if both processes have the right sum.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

LIMIT = timedelta(seconds=8)  # shorter than the doctor waits, so that the reason of a failure reaches it


def add_over_processes(rank: int, backend: str, port: int) -> float:
    """The sum of 1 and 2 over the two processes, on the CPU (gloo) or with a GPU for each (nccl)."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    store.set(f"ready-{rank}", "")
    store.wait(["ready-0", "ready-1"])  # on a busy machine, importing torch can take long: that is no failure
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=LIMIT)
    number = torch.tensor([rank + 1.0], device=f"cuda:{rank}" if backend == "nccl" else "cpu")
    dist.all_reduce(number)
    total = number.item()
    dist.destroy_process_group()
    return total


if __name__ == "__main__":
    sys.exit(add_over_processes(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])) != 3.0)
