"""The library: load a model, plan a run, make pictures."""
