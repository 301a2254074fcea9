"""Parts of `bokehflux.nano.scenes`: what is in a scene, how it is painted, how it blurs."""
