"""Evaluation: ask a benchmark's questions, score the answers by its official rules, compare two models.

`benchmarks/` has one pure-Python file per benchmark (where its files are, its prompts, its official rules); `tasks.py`
finds one by its name. `run.py` asks a checkpoint, and `score.py` reads an answers file. `results.py` writes the scores
of both, with intervals; `compare.py` tests two of them against each other. The users' page is docs/evaluation.md.
"""
