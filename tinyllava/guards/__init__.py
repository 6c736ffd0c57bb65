"""What watches a stage while it trains: gradients, frozen weights, losses and memory. Read gradients.py first."""
