"""Questions in, answers and official scores out.

`benchmarks/` holds one pure-Python file a benchmark (where its files lie, its prompts, its official rules); `tasks.py`
finds one by its name. `run.py` asks a checkpoint and `score.py` reads an answers file; both end in `results.py`, with
intervals, and `compare.py` tests two of those against each other. What users need to know is in docs/evaluation.md.
"""
