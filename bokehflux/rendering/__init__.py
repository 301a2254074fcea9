"""How defocus looks: the shapes that points of light become."""
