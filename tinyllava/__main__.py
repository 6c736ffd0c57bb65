"""`python -m tinyllava`, for launchers such as torchrun."""

from tinyllava.cli import main

main()
