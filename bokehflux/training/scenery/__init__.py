"""The parts that `bokehflux.training.scenes` puts together: what is in a scene, how it is painted, how it blurs."""
