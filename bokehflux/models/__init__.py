"""The networks, built complete from a config; parameter names follow the official checkpoints."""
