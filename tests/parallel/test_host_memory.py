"""Programs that compute on the CPU take huge pages, and only those."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

from dmpo_jax.parallel import host_memory

PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
import os, resource, sys
from dmpo_jax.parallel import host_memory

if sys.argv[1] == "huge":
    host_memory.use_huge_pages()

import jax, jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.device_put(jnp.ones((2, 1024)), jax.NamedSharding(mesh, jax.P("data")))
# 64 MB a device that no fusion can do without.
f = jax.jit(lambda x: jnp.sort(jnp.outer(jnp.arange(16384.0), x[0]), axis=0)[-1])
run = f.lower(x).compile()
counts = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sys.argv[2], min(counts), os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.fixture
def started(monkeypatch):
    """What would be started instead, on a machine that has a CPU alone."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda *call: calls.append(call))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "train.py", "--config=a b"])
    return calls


def test_a_program_is_started_once_more_as_it_was(started):
    host_memory.use_huge_pages()
    host_memory.use_huge_pages()
    assert started == [(sys.executable, [sys.executable, "-u", "train.py", "--config=a b"])]


def test_what_the_user_has_set_stays(started, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    host_memory.use_huge_pages()
    assert not started
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
    host_memory.use_huge_pages()
    assert started
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=3:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize("platforms", ["tpu", "cuda,cpu"])
def test_accelerators_are_left_alone(started, monkeypatch, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    host_memory.use_huge_pages()
    assert not started


@pytest.mark.skipif(
    platform.libc_ver() < ("glibc", "2.35")
    or not PAGES.exists()
    or "[madvise]" not in PAGES.read_text(),
    reason="needs glibc 2.35 and huge pages for those that ask",
)
def test_temporaries_come_in_few_pages(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

    def faults(mode: str) -> tuple[int, str]:
        command = [sys.executable, "-c", FAULTS, mode, "a word"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout.startswith("a word ")
        count, tunables = done.stdout.removeprefix("a word ").split()
        return int(count), tunables

    small, unset = faults("small")
    huge, tunables = faults("huge")
    assert (unset, tunables) == ("None", "glibc.malloc.hugetlb=1")
    assert small > 10_000
    assert 10 * huge < small
