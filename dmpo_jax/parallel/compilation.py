"""JAX's on-disk cache of compiled programs."""

import os
import pathlib

import jax

from dmpo_jax import storage


def cache_compilations() -> None:
    """Caches compiled programs in the user's cache folder, unless JAX has another one set."""
    if cache_folder() is None:
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "dmpo_jax", "xla"))


def cache_folder() -> str | None:
    """Returns the folder of JAX's cache; None if there is none."""
    return jax.config.values["jax_compilation_cache_dir"]


def describe_cache() -> str:
    """Says where the cache is and how many training steps it holds, of any config."""
    folder = cache_folder()
    if folder is None or storage.is_remote(folder):
        return f"compilation cache: {folder or 'off'}"
    count = len(list(pathlib.Path(folder).glob("jit_train_step-*-cache")))
    return f"compilation cache: {folder}, {count} training steps; any other one is compiled first"
