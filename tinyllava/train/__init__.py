"""Training: one stage is build -> tune -> data -> train -> save (stage.py); plan.py decides who trains on what."""
