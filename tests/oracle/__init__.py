"""What ours is compared with, by tests and benchmarks: diffusers and the published formulation."""
