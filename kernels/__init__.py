"""Compute kernels behind plain functions on tensors. A leaf: imports torch only, triton lazily; never bokehflux."""
