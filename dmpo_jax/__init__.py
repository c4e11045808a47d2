"""Preference alignment for latent diffusion models in JAX."""

__version__ = "0.1.0"
