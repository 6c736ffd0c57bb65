"""What a command says when the system, or another process of the same training run, fails.

One process that fails ends all: torchrun stops the others. The cause must be found on the screen, so what all processes
would say is said once, and torchrun's summary repeats the error of the process that failed first.
"""

import errno
import hashlib
import json
import os
import re
import time
from pathlib import Path

# What gloo (all its errors name its source files) and NCCL say when another process ended or does not answer.
LOST = re.compile(r"gloo/transport|remote process exited|connection (closed|reset) by peer|broken pipe", re.IGNORECASE)
LOST_MESSAGE = (
    "another process of this training run ended, or does not answer. Its own error is above, or below at `Root Cause`."
)
# What torch says of a data worker that died. An error that a worker raised names its number instead, and is another.
DEAD_WORKER = re.compile(r"DataLoader worker \(pid[^)]*\).*|Pin memory thread exited unexpectedly")
# Seconds. torchrun compares whole seconds, and it notices a killed process, which wrote nothing, after up to 0.1 s.
FOLLOWS = 5


def describe_failure(error: OSError | RuntimeError) -> str | None:
    """What to tell the user of an error that is no fault of the code; None for any other error."""
    if isinstance(error, RuntimeError):
        if dead := find_dead_worker(error):  # torch tells of it wherever the main process is, also in a cleanup
            return describe_worker(dead)
        return LOST_MESSAGE if LOST.search(str(error)) else None
    not_a_directory = error.errno in {errno.EEXIST, errno.ENOTDIR}
    if not not_a_directory and error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}:
        return None
    remedy = " It must be a directory. Choose another one." if not_a_directory else ""
    return f"{error.strerror}: {error.filename or 'while writing'}.{remedy}"


def find_dead_worker(error: BaseException) -> str | None:
    """What torch says of the data worker that died; None for any other error."""
    found = DEAD_WORKER.search(str(error))
    return found and found[0].strip()


def describe_worker(reason: str, setting: str = "dataloader_num_workers") -> str:
    """What to tell the user when a data worker died, or has no memory. setting: the option, with its value if known."""
    return (
        f"a process that reads data died: {reason.rstrip('.')}. The memory of the machine or of /dev/shm may be used"
        f" up: lower {setting}. Earlier checkpoints are intact."
    )


def announce_failure(text: str) -> bool:
    """Whether this process is to show `text`: no other process that the same torchrun started has shown it.

    torchrun gets the text for its summary, which names the earliest failure as the cause.
    """
    # torchrun makes a directory for the processes of a node, and in it one for each process.
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return True
    try:
        timestamp = int(time.time()) + (FOLLOWS if text == LOST_MESSAGE else 0)
        message = {"message": text, "extraInfo": {"timestamp": str(timestamp)}}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
        Path(path).parents[1].joinpath(hashlib.sha256(text.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the directory cannot be written: better shown twice than not at all
        return True
    return True
