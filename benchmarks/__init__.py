"""What bokehflux is measured by: `python -m benchmarks.run --list` shows the questions."""
