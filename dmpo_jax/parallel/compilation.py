"""JAX's cache of compiled programs on disk."""

import os

import jax


def cache_compilations() -> None:
    """Keeps compiled programs in the user's cache, unless JAX was told of another place."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "dmpo_jax", "xla"))
