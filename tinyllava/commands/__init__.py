"""The code of the commands in cli.py, one file per command. Read look.py first."""
