"""Data and training: the procedural renderer, and the stages that make a bundled model."""
