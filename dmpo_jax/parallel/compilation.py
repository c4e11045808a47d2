"""JAX's on-disk cache of compiled programs."""

import os

import jax


def cache_compilations() -> None:
    """Caches compiled programs in the user's cache folder, unless JAX has another one set."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "dmpo_jax", "xla"))
