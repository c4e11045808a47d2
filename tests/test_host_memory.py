"""Freed memory is kept where programs run on the CPU, and only there."""

import subprocess
import sys

from dmpo_jax import host_memory

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from dmpo_jax import host_memory

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
if sys.argv[1] == "keep" and not host_memory.keep_freed_memory():
    sys.exit("this system's malloc cannot be told")
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.device_put(jnp.ones((2, 1024)), jax.NamedSharding(mesh, jax.P("data")))
# 64 MB a device that no fusion can do without.
f = jax.jit(lambda x: jnp.sort(jnp.outer(jnp.arange(16384.0), x[0]), axis=0)[-1])
run = f.lower(x).compile()
counts = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts))  # two devices may ask in an order that needs new room once more
"""


def test_accelerators_are_left_alone(monkeypatch):
    for platforms in ("tpu", "cuda,cpu"):
        jax_config = type("Config", (), {"values": {"jax_platforms": platforms}})
        monkeypatch.setattr(host_memory, "jax", type("Jax", (), {"config": jax_config}))
        assert not host_memory.keep_freed_memory()


def test_a_program_that_ran_before_takes_no_new_pages():
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", FAULTS, mode]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(done.stdout)

    anew, kept = faults("let"), faults("keep")
    assert anew > 10_000
    assert kept < 1_000
