"""Photographs as they come from cameras and phones."""
