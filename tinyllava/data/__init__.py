"""Data: text and images become batches. Nothing here knows a model.

Read sample.py first, then dataset.py. labels.py decides which tokens are trained; sources/ has one file a format.
"""
