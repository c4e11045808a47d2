"""On CPUs freed memory stays with the process; a user's own setting stands."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of glibc")

# Fills a block of 400 MB five times, in a thread of its own, as XLA's threads do. A heap of a
# thread's own has 64 MB.
PROGRAM = """
import ctypes, resource, threading
from dmpo_jax.parallel.allocator import keep_freed_memory
print(keep_freed_memory())
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
def fill():
    for _ in range(5):
        block = libc.malloc(400_000_000)
        libc.memset(block, 1, 400_000_000)
        libc.free(block)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=fill)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 400_000_000 // os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 0


def _run(**environment: str) -> tuple[str, int]:
    """Returns (whether it took effect, pages that the system had to clear)."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    effect, faults = done.stdout.split()
    return effect, int(faults)


def test_a_buffer_is_cleared_once():
    effect, faults = _run(JAX_PLATFORMS="cpu")
    assert effect == "True"
    assert PAGES < 1.1 * faults < 2 * PAGES


def test_a_users_setting_of_glibc_stands():
    effect, faults = _run(JAX_PLATFORMS="cpu", MALLOC_ARENA_MAX="8")
    assert effect == "False"
    assert faults > 4 * PAGES
