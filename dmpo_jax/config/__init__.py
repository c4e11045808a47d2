"""A run's settings: their declaration, checks, recipes and command line."""

from dmpo_jax.config.configs import Config, debug, defaults, flatten, from_flat

__all__ = ["Config", "debug", "defaults", "flatten", "from_flat"]
