"""The fault table: each fault strikes a real run, the same command runs again, and the results are compared.

    make faults                                  # everything, as a table; exits with 1 if a row fails
    python -m tests.faults --only SIGTERM        # rows whose name contains a text
    python -m tests.faults --markdown            # the table of docs/scale.md

Read `scene.py` first: what a run is, and how two runs are compared. `points.py` strikes inside the process. The faults
themselves are in `kills.py`, `disks.py`, `data.py`, `directories.py` and `ranks.py`.
"""
