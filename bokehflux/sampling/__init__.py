"""Noise, schedule, samplers and the denoising loop."""
