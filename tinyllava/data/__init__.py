"""Text and pictures become batches here. Nothing in this package knows a model."""
