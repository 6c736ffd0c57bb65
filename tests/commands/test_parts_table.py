"""The table of the three parts adds up and names each learning rate."""

import io

from rich.console import Console

from tinyllava.commands.parts_table import make_parts_table
from tinyllava.train.tune import TunedPart


def render(renderable: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_the_parts_table_adds_up_and_names_each_rate() -> None:
    rows = [
        TunedPart("vision_tower", "SiglipVisionModel", "frozen", None, 400_000_000, 0, "bfloat16"),
        TunedPart("connector", "mlp2x_gelu", "full", 5e-4, 1_000, 1_000, "float32"),
        TunedPart("llm", "PhiModel", "lora (r 128, alpha 256)", None, 2_600_000_000, 20_000_000, "bfloat16"),
    ]
    lines = [line.strip() for line in render(make_parts_table(rows, lr=2e-5)).splitlines()]
    tower, connector, llm = (
        next(line for line in lines if line.startswith(part)) for part in ("vision tower", "connector", "LLM")
    )
    total = lines.index(next(line for line in lines if line.startswith("total")))
    assert "400.0 M" in tower and " - " in tower and "2e-05" not in tower
    assert "0.0005" in connector and "1,000" in connector
    assert "2e-05" in llm and "20.0 M" in llm and "lora" in llm
    assert "3.00 B" in lines[total] and "20.0 M" in lines[total] and "0.7 %" in lines[total + 1]
    assert "SiglipVisionModel" in render(make_parts_table(rows, lr=2e-5), width=80)
