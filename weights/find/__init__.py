"""Where the parts of a model lie: folders in any layout, and the places in which models are looked for."""
