"""A module each: what one benchmark computes. Each has a `BENCHMARK`; `benchmarks.registry` lists them."""
