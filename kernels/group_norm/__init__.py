"""Group normalisation followed by SiLU, the elementwise work of the autoencoder."""
