"""Compute kernels behind plain functions on tensors. A leaf: imports torch, triton lazily, never bokehflux."""
