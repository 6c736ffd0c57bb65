"""The model: vision tower, connector and LLM as one VLM, built from a recipe. Read vlm.py first, then build.py.

Checkpoints are saved and loaded in tinyllava/checkpoint/.
"""
