"""What is trained, on what, and how: one module a recipe, over the loop of `bokehflux.training`."""
