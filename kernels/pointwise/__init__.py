"""Passes over tokens between matrix products: norms, modulation, gates, rotations, GELU."""
