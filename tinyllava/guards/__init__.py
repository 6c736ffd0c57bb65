"""What watches a stage while it trains. Read gradients.py first.

    gradients.py   what is trained gets a gradient, what is frozen does not change, and all weights are numbers
    losses.py      a loss that is not a number ends the run, spikes are named with their samples, skipped steps counted
    shortage.py    how much memory a stage needs, and what to change when there is not enough

`train/` calls them in every run, and `tinyllava look` shows the estimate of shortage.py. They import models and data,
and nothing of `train/`. docs/training.md (Guards) lists what stops a run.
"""
