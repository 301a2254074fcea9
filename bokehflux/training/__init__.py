"""Training: objectives, batches, the loop and its state. Knows no particular model."""
