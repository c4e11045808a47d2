"""Memory of a LoRA step against a full one: SD1.5 at full size, DMPO, on this machine's CPU.

    python benchmarks/memory/lora_memory.py [--latents=16] [--rank=16]

Each of the two runs two steps in a process of its own, with random weights, one pair a step.
Reported: bytes that the step's arguments take, by part; XLA's count of temporaries; and the
process's peak resident memory (VmHWM). Writes results/lora_memory_DTYPE.json beside this file.
In float32 the full step does not fit 24 GB.
"""

import argparse
import functools
import gc
import json
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

from dmpo_jax.families.stable_diffusion import SD15

HERE = pathlib.Path(__file__).parent


def measure(kind: str, latents: int, rank: int, dtype: str) -> dict:
    """Two steps of `kind`, "full" or "lora", in this process."""
    import jax
    import jax.numpy as jnp

    from dmpo_jax.diffusion.noise import make_ddpm_table
    from dmpo_jax.families import SD
    from dmpo_jax.models import lora, parameters
    from dmpo_jax.models.unet import UNet2DConditionModel
    from dmpo_jax.objectives import OBJECTIVES
    from dmpo_jax.training import optim, step
    from dmpo_jax.types import Condition, PairBatch

    model = parameters.initialise(UNet2DConditionModel, SD15, 0, dtype=dtype)
    held = functools.partial(parameters.frozen_dtype, dtype=dtype)
    if kind == "lora":
        targets = ("to_q", "to_k", "to_v", "to_out.0")
        model = lora.attach(model, rank=rank, alpha=rank, targets=targets, seed=0)
    structure, params = parameters.split(model)
    del model
    frozen, adapters = lora.partition(params)
    if kind == "full":
        adapters = frozen
    frozen = {p: jnp.array(x, held(p), copy=kind == "full") for p, x in frozen.items()}
    del params
    gc.collect()
    tx = optim.make_optimizer(1e-5)
    state = jax.jit(functools.partial(step.make_state, tx=tx), donate_argnums=0)(adapters)
    del adapters
    setup = step.Setup(
        predict=SD.make_predict(functools.partial(parameters.merge, structure)),
        objective=functools.partial(OBJECTIVES["dmpo"], beta=2000.0, alpha=0.01),
        needs_reference=True,
        needs_rejected=True,
        schedule=make_ddpm_table(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        scaling_factor=0.18215,
        tx=tx,
        adapters=kind == "lora",
    )
    keys = jax.random.split(jax.random.key(1), 2)
    batch = PairBatch(
        jax.random.normal(keys[0], (1, 2, latents, latents, 8)),
        jnp.ones(1),
        Condition(jax.random.normal(keys[1], (1, 77, 768))),
    )

    def size(tree) -> float:
        return sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e9

    sizes = {
        "trained_gb": size(state.params),
        "optimizer_gb": size(state.opt_state),
        "frozen_gb": size(frozen),
    }
    key, began = jax.random.key(0), time.monotonic()
    update = step.jit_train_step(setup).lower(state, frozen, batch, key).compile()
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
