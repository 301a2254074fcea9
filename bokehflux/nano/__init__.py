"""The bundled model: its world of rendered scenes, its captions, its recipe."""
