"""Questions in, answers and official scores out.

`benchmarks/` holds one pure-Python file a benchmark (where its files lie, its prompts, its official rules); `score.py`
matches an answers file to the questions and scores it: `tinyllava score pope --data ROOT --answers FILE`.
"""
