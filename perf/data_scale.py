"""How long data takes to open, and how much memory a worker needs, at several sizes. Text only: no image is decoded.

    python perf/data_scale.py stream 100_000 1_000_000      # Parquet, and JSON lines with `streaming: true`
    python perf/data_scale.py mapped 30_000 100_000         # tokenised in advance

Each measurement is a process of its own. "memory" is the peak resident size of the process; "bare" is that of one
which reads ten records. docs/data.md has the figures.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

FILES = 64
ANSWER = " the cat sits on a red mat and looks at the small blue bird that sings in the old tree by the river" * 6


def write_parquet(folder: Path, count: int) -> str:
    """`count` records of about 600 bytes, with ids of their own, in 64 files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": ANSWER}]
    for number in range(FILES):
        ids = [str(row) for row in range(number * count // FILES, (number + 1) * count // FILES)]
        column = pa.array([turns] * len(ids), pa.list_(turn))
        table = pa.table({"id": pa.array(ids), "conversations": column})
        pq.write_table(table, folder / f"part-{number:03}.parquet", row_group_size=1000, use_dictionary=False)
    return str(folder / "*.parquet")


def write_json(folder: Path, count: int) -> str:
    """The same records as JSON lines."""
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": ANSWER}]
    text = json.dumps({"id": "ROW", "conversations": turns})
    with (folder / "data.jsonl").open("w") as file:
        file.writelines(text.replace("ROW", str(row)) + "\n" for row in range(count))
    return str(folder / "data.jsonl")


def measure(path: str, streaming: bool, steps: int) -> dict[str, float]:
    """Open the data in this process, and read the samples of some steps."""
    from tests.data.conftest import tokenizer as make_tokenizer
    from tinyllava.config import DataSpec
    from tinyllava.data.dataset import build_dataset
    from tinyllava.data.options import DataOptions
    from tinyllava.data.template import Template

    tokenizer = make_tokenizer.__wrapped__() if hasattr(make_tokenizer, "__wrapped__") else make_tokenizer()
    options = DataOptions(Template.load("phi"), tokenizer, 4, pixels=None, max_length=4096)
    start = time.perf_counter()
    dataset = build_dataset([DataSpec(path=path, streaming=streaming)], options)
    opened = time.perf_counter()
    if streaming:
        stream = dataset.iterate_steps(range(0, 64, 8), 64)  # one of eight workers
        next(stream)
        first = time.perf_counter()
        samples = sum(map(len, islice(stream, steps)))
    else:
        first, samples = time.perf_counter(), 0
        lengths = dataset.lengths
        for row in range(min(8 * steps, len(lengths))):
            dataset[row]
            samples += 1
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"open": opened - start, "first": first - opened, "per_second": samples / max(end - first, 1e-9)}
    return figures | {"memory": peak}


def run(path: str, streaming: bool, steps: int, cache: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "TINYLLAVA_CACHE": cache, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "one", path, str(int(streaming)), str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a line for each kind of file and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["stream", "mapped", "one"])
    parser.add_argument("values", nargs="+")
    given = parser.parse_args()
    if given.kind == "one":
        path, streaming, steps = given.values
        print(json.dumps(measure(path, streaming == "1", int(steps))))
        return
    streaming = given.kind == "stream"
    print(f"{'records':>10}  {'file':8} {'open':>8} {'again':>8} {'first':>8} {'samples/s':>10} {'memory':>9}")
    for count in (10, *map(int, given.values)):
        for kind, write in {"parquet": write_parquet, "json": write_json}.items():
            with tempfile.TemporaryDirectory() as folder:
                path = write(Path(folder), max(count, FILES))
                first = run(path, streaming, 200, f"{folder}/cache")
                again = run(path, streaming, 200, f"{folder}/cache")
            figures = f"{first['open']:7.2f}s {again['open']:7.2f}s {again['first']:7.2f}s {again['per_second']:10,.0f}"
            print(f"{count:10,}  {kind:8} {figures} {again['memory']:6,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
