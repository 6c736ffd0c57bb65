"""Make the table of the three parts: class, parameters, trained parameters, tuning and learning rate."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tinyllava.train.tune import TunedPart


def make_parts_table(rows: list[TunedPart], lr: float) -> Table:
    """The table with one row for each part. lr: the stage's learning rate, for parts without their own."""
    table = Table(box=SIMPLE_HEAD, show_footer=True, pad_edge=False, collapse_padding=True)
    total, trainable = sum(row.parameters for row in rows), sum(row.trainable for row in rows)
    table.add_column("part", "total")
    table.add_column("class", no_wrap=True)
    table.add_column("parameters", _format_count(total), justify="right", no_wrap=True)
    table.add_column(
        "trainable",
        f"{_format_count(trainable)}\n{100 * trainable / max(total, 1):.1f} %",
        justify="right",
        no_wrap=True,
    )
    table.add_column("tuning")
    table.add_column("learning rate", justify="right")
    table.add_column("dtype", no_wrap=True)
    for row in rows:
        rate = f"{row.lr or lr:g}" if row.trainable else "-"
        dtype = row.dtype.replace("bfloat", "bf").replace("float", "fp")  # as TrainingArguments call them
        cells = (_format_count(row.parameters), _format_count(row.trainable), row.tuning, rate, dtype)
        table.add_row(row.title, row.class_name, *cells, style="" if row.trainable else "dim")
    return table


def _format_count(number: int) -> str:
    """A number of parameters as text: exact below ten million, else as 412.4 M or 2.78 B."""
    if number < 10_000_000:
        return f"{number:,}"
    return f"{number / 1e6:.1f} M" if number < 1_000_000_000 else f"{number / 1e9:.2f} B"
