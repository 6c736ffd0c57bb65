"""Draw `curve.png`: the loss of a stage, and below it the learning rates and the gradient norm."""

from pathlib import Path
from typing import Any

import numpy as np

from tinyllava import atomic

SMOOTHING = 0.05  # the thick line averages over this share of the run


def smooth(values: list[float]) -> np.ndarray:
    """The exponential moving average, with the bias correction of Adam for the first values."""
    decay = 1 - 1 / max(2.0, SMOOTHING * len(values))
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return np.array(smoothed)


def read_series(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the log lines that hold a number under `key`."""
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw_curve(lines: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the log lines of a stage into `path`, a PNG. Does nothing before the first training loss."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display and has global state

    steps, losses = read_series(lines, "loss")
    if not steps:
        return
    figure = Figure(figsize=(8, 6.5), dpi=110, layout="constrained")
    loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=[4, 1.3, 1.3])
    blue, red = "#1f5fa8", "#c2410c"

    averaged = smooth(losses)
    loss.plot(steps, losses, color=blue, alpha=0.35, linewidth=1, label="training, as logged")
    loss.plot(steps, averaged, color=blue, linewidth=2, label=f"training, smoothed ({averaged[-1]:.3f} at the end)")
    eval_steps, eval_losses = read_series(lines, "eval_loss")
    if eval_steps:
        end = f"validation ({eval_losses[-1]:.3f} at the end)"
        loss.plot(eval_steps, eval_losses, color=red, marker="o", markersize=4, linewidth=1.5, label=end)
    loss.set_ylabel("loss per supervised token")
    loss.set_title(title, loc="left", fontweight="bold")
    loss.legend(frameon=False)

    keys = sorted({key for line in lines for key in line if key.startswith("lr/")}) or ["learning_rate"]
    for number, key in enumerate(keys):  # parts often have the same rate: dashes show the line below
        dashes = (0, ()) if number == 0 else (number * 4, (4, 4 * number))
        rate.plot(
            *read_series(lines, key), linestyle=dashes, linewidth=1.8, label=key.removeprefix("lr/").replace("_", " ")
        )
    rate.set_ylabel("learning\nrate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.legend(frameon=False, fontsize="small", ncols=len(keys))

    norm.plot(*read_series(lines, "grad_norm"), color="#4d4d4d", linewidth=1)
    norm.set_ylabel("gradient\nnorm")
    norm.set_xlabel("optimiser step")
    for axes in (loss, rate, norm):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (rate, norm):
        axes.set_ylim(bottom=0)
    figure.align_ylabels()
    with atomic.write_file(path) as partial:
        figure.savefig(partial, format="png")
