"""Fuzzers: inputs that nobody would write, and only our own errors may come out. `make fuzz MINUTES=10` runs them.

    make fuzz TARGET=records SEED=7     one target; the same seed tries the same inputs

A target is one file in targets/ with `build(folder) -> list[Case]`. Read harness.py first, then targets/images.py.
"""
