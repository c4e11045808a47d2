"""How a process that computes on the CPU gets its memory from the system."""

import importlib.util
import os
import sys

_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def use_huge_pages() -> None:
    """Starts this program once more, with pages of 2 MB for its memory; on a CPU alone.

    A compiled step's temporaries are one allocation, freed at its end, and the system fills
    them with zeros anew at every step, page by page: at 4 KB a page a third of the digits
    step's time. glibc (2.35 and later) reads the setting only when a program starts, hence
    the second start: to be called before anything that takes long is imported. Elsewhere, and
    where the kernel has no transparent huge pages, the setting is without effect.

    Keeping freed memory instead, by mallopt, takes a single arena, for which the threads of
    two devices wait: on some days that costs more than the pages do.
    """
    tunables = os.environ.get(_TUNABLES, "")
    if not (sys.platform == "linux" and _only_cpu()) or _HUGE_PAGES in tunables:
        return
    os.environ[_TUNABLES] = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _only_cpu() -> bool:
    """Without importing JAX, which takes a second."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
