"""How this process allocates host memory."""

import ctypes
import os
import pathlib
import sys

# Parameters of glibc's mallopt, by <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_DEVICES = ("nvidia[0-9]*", "accel*", "vfio/[0-9]*", "kfd")  # in /dev, of GPUs and TPUs


def keep_freed_memory() -> bool:
    """Makes glibc keep what is freed, up to 1 GiB each, where the devices are CPUs.

    XLA's CPU backend frees a step's buffers after each use, in its own threads. By default glibc
    hands them back to the system, which clears each page anew: a quarter of the time of a step of a
    small model. Blocks of 1 GiB and more still go back at once.

    Call it before JAX makes its devices, whose threads would have heaps of their own. It does
    nothing on machines with an accelerator, whose hosts compile with many threads, nor where
    the user set one of glibc's MALLOC_ variables, nor without glibc.

    Returns:
        Whether it took effect.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(
        any(pathlib.Path("/dev").glob(name)) for name in _DEVICES
    )
    theirs = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or not on_cpu or theirs:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    settings = {
        _ARENA_MAX: 1,  # another heap's blocks above 64 MB go back at once, whatever else is set
        _MMAP_THRESHOLD: 2**30,
        _TRIM_THRESHOLD: -1,  # never
        _TOP_PAD: 2**28,
    }
    return all([mallopt(*setting) == 1 for setting in settings.items()])
