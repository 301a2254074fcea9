"""Judging a model: figures on its pictures, reports, and the bundled model's card."""
