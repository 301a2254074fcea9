"""Scatter: every pixel spreads its light over a disc of its own radius, or another shape of an iris."""
