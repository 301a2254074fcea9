"""LoRA files: read in every key family, then attached beside the weights or merged into them."""
