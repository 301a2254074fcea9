"""Checkpoint files: opened, mapped, unpacked and written. Knows names and shapes, but no networks."""
