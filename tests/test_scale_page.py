"""docs/scale.md: the job script for Slurm, with stand-ins for the commands of a cluster."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "scale.md"
SRUN = """#!/bin/bash
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "${@:2}" || exit; done
"""
PYTHON = '#!/bin/bash\necho "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$STARTED"\nexit "$CODE"\n'
SCONTROL = '#!/bin/bash\n[ "$1" = show ] && echo node1 && echo node2 || echo "$*" >> "$REQUEUED"\n'


def run_script(folder: Path, code: int) -> tuple[int, list[str], list[str]]:
    """Run the script with tasks that exit with `code`. Returns its own code, what was started and what was requeued."""
    script = next(block for block in blocks(PAGE, "bash") if block.startswith("#!/bin/bash"))
    (folder / "train.sbatch").write_text(script)
    for name, content in {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL}.items():
        (folder / name).write_text(content)
        (folder / name).chmod(stat.S_IRWXU)
    started, requeued = folder / "started", folder / "requeued"
    slurm = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[1-2]"}
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "STARTED": str(started), "REQUEUED": str(requeued)}
    done = subprocess.run(["bash", "train.sbatch"], cwd=folder, env={**os.environ, **slurm, **paths, "CODE": str(code)})
    return done.returncode, *(path.read_text().splitlines() if path.exists() else [] for path in (started, requeued))


@pytest.mark.parametrize("code", [0, 2, 75, 130])
def test_the_job_is_requeued_only_after_a_stop_that_saved_everything(code: int, tmp_path: Path) -> None:
    returned, started, requeued = run_script(tmp_path, code)
    assert returned == code
    assert requeued == (["requeue 41"] if code == 75 else [])
    first = "0 0 2 node1 20041 -m tinyllava train my-training.yaml --output /shared/runs/my-training"
    second = first.replace("0 0", "1 1", 1)
    assert started == ([first, second] if code == 0 else [first])
