"""Pages: what a person looks at after a run. curve.py draws the loss of a stage, its rates and its gradient norm."""
