"""Products in fp8: rows quantised to e4m3, each with its own scale; the definition, Triton, one interface."""
