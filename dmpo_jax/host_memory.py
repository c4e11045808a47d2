"""How a process that computes on the CPU gets its memory from the system."""

import ctypes
import importlib.util
import sys

import jax

# Parameters of glibc's mallopt, from its malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Has memory that was freed taken again, not given back to the system; on a CPU alone.

    A compiled step's temporaries are one allocation, freed at its end. glibc maps one of over
    32 MB anew each time, and the system fills it with zeros page by page: a third of the
    digits step's time. From here on the process stays as large as it once was. To be called
    before JAX starts its threads, each of which would keep an arena of its own.

    Returns:
        Whether it was done: with glibc, and where JAX can find no accelerator.
    """
    if not (_only_cpu() and sys.platform == "linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return mallopt is not None and all([mallopt(*setting) for setting in settings])


def _only_cpu() -> bool:
    """Without asking JAX for its devices, which would start its threads."""
    if platforms := jax.config.values["jax_platforms"]:
        return platforms == "cpu"
    return not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
