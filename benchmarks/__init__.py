"""What bokehflux is measured by: one file per question, run as `python -m benchmarks.bench_<name>`."""
