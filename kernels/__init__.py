"""Compute kernels behind plain functions on tensors. A leaf: imports torch, lazily triton, no bokehflux."""
