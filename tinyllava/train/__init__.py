"""Training: one stage is build -> tune -> data -> train -> save. Read stage.py first.

tune.py decides what is trained in each part (frozen, LoRA, ...). plan.py decides which samples each process trains on.
"""
