"""What stands behind the commands of cli.py that are longer than a few lines."""
