"""Checkpoints: reading files, mapping names, building networks. Also holds the bundled model (`nano/`)."""
