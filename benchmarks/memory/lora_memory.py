"""Memory of a LoRA step against a full one: SD1.5 at full size, DMPO, on this machine's CPU.

    python benchmarks/memory/lora_memory.py [--latents=16] [--rank=16]

Each of the two runs two steps in a separate process, with random weights, one pair per step.
Reported: bytes of the step's arguments, by part; XLA's count of temporaries; and the process's
peak resident memory (VmHWM). Writes benchmarks/results/lora_memory_DTYPE.json.
In float32 the full step does not fit 24 GB.
"""

import argparse
import gc
import json
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

HERE = pathlib.Path(__file__).parent


def measure(kind: str, latents: int, rank: int, dtype: str) -> dict:
    """Runs two steps of `kind`, "full" or "lora", in this process."""
    import jax
    import jax.numpy as jnp

    from dmpo_jax.families import PUBLISHED
    from dmpo_jax.models import parameters
    from dmpo_jax.models.lora import Adapters
    from dmpo_jax.objectives import OBJECTIVES
    from dmpo_jax.parallel import meshes
    from dmpo_jax.planning.step import of_published
    from dmpo_jax.training.build import Rate, StepSettings, build

    published = PUBLISHED["sd15"]
    planned = of_published(published, "sd15", resolution=8 * latents, moments_dtype="float32")
    settings = StepSettings(
        objective=OBJECTIVES["dmpo"],
        hyperparameters={"beta": 2000.0, "alpha": 0.01},
        batch_size=1,
        compute_dtype=dtype,
        lora=Adapters(rank) if kind == "lora" else None,
        rate=Rate(peak=1e-5),
    )
    model = parameters.initialise(published.family.model, dict(published.model), 0, dtype=dtype)
    devices = meshes.make_mesh(devices=jax.devices()[:1])
    built, params = build(published.family, model, planned.noise, planned.meta, devices, settings)
    del model
    gc.collect()
    frozen = built.reference
    state = built.make_state(params)
    del params
    keys = jax.random.split(jax.random.key(1), 2)
    batch = planned.meta.zeros(1)
    batch = batch._replace(
        moments=jax.random.normal(keys[0], batch.moments.shape),
        preference=jnp.ones(1),
        condition=batch.condition._replace(
            context=jax.random.normal(keys[1], batch.condition.context.shape)
        ),
    )

    def size(tree) -> float:
        return sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e9

    sizes = {
        "trained_gb": size(state.params),
        "optimizer_gb": size(state.opt_state),
        "frozen_gb": size(frozen),
    }
    batch = jax.device_put(batch, built.batch_sharding())
    key, began = built.make_key(0), time.monotonic()
    update = built.make_update(state).lower(state, frozen, batch, key).compile()
    compiled = time.monotonic() - began
    first = None
    for _ in range(2):
        began = time.monotonic()
        state, metrics = update(state, frozen, batch, key)
        margin = float(metrics["margin_abs_max"])
        first = margin if first is None else first
    analysis: Any = update.memory_analysis()
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return {
        **sizes,
        "temporaries_gb": analysis.temp_size_in_bytes / 1e9,
        "peak_resident_gb": int(found[1]) * 1024 / 1e9 if found else None,
        "compile_s": compiled,
        "second_step_s": time.monotonic() - began,
        "margin_at_step_0": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=16, help="side of the latents")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--kind", choices=["full", "lora"], help="this one, in this process")
    given = parser.parse_args()
    if given.kind:
        print(json.dumps(measure(given.kind, given.latents, given.rank, given.dtype)))
        return
    results = {}
    for kind in ("full", "lora"):
        print(f"{kind} ...", flush=True)
        settings = [f"--{k}={getattr(given, k)}" for k in ("latents", "rank", "dtype")]
        run = subprocess.run(
            [sys.executable, __file__, f"--kind={kind}", *settings],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results[kind] = json.loads(run.stdout.splitlines()[-1])
    print(f"{'':<22}{'full':>10}{'LoRA':>10}")
    for name in results["full"]:
        a, b = results["full"][name], results["lora"][name]
        print(f"{name:<22}{a:>10.3f}{b:>10.3f}")
    about = {"model": "SD1.5", "latents": given.latents, "rank": given.rank, "dtype": given.dtype}
    out = HERE.parent / "results" / f"lora_memory_{given.dtype}.json"
    out.write_text(json.dumps({**about, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
