"""One DMPO update of ours by `step.jit_train_step`, as in the train job, with random weights.

python benchmarks/speed/our_step.py CASE           # JSON, from gpu_step.py; prints JSON
"""

import json
import math
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from dmpo_jax.data.encoded.meta import EncodedMeta
from dmpo_jax.diffusion.noise import make_ddpm_table
from dmpo_jax.families import SD, SDXL, Family
from dmpo_jax.models import parameters
from dmpo_jax.models.execution import Execution
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.parallel import meshes
from dmpo_jax.planning import flops
from dmpo_jax.training.build import Rate, StepSettings, build
from dmpo_jax.training.telemetry import memory
from dmpo_jax.types import Condition, PairBatch


def draw(shapes: dict[str, Any]) -> parameters.Params:
    """Draws kernels of deviation 1/sqrt(fan in), norms one, biases zero, on the device."""
    normal = jax.jit(jax.random.normal, static_argnums=1)  # one program a shape
    drawn = {}
    for i, (path, leaf) in enumerate(shapes.items()):
        if path.endswith("kernel"):
            deviation = math.prod(leaf.shape[:-1]) ** -0.5
            drawn[path] = normal(jax.random.key(i), leaf.shape) * deviation
        else:
            drawn[path] = jnp.full(leaf.shape, float(path.endswith("scale")))
    return drawn


class OurStep:
    """The compiled step, its state and one batch."""

    def __init__(self, case: dict[str, Any]):
        settings = StepSettings(
            objective=OBJECTIVES["dmpo"],
            hyperparameters={"beta": case["beta"], "alpha": case["alpha"]},
            batch_size=case["batch_size"],
            compute_dtype=jnp.bfloat16,
            execution=Execution(case["attention"], case["remat"], case["scan"]),
            rate=Rate(peak=case["learning_rate"]),
        )
        model = parameters.abstract(family(case).model, case["unet"], dtype=jnp.bfloat16)
        structure, shapes = parameters.split(model)
        noise = make_ddpm_table(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        devices = meshes.make_mesh(devices=jax.devices()[:1])
        model = parameters.merge(structure, draw(shapes))
        built, params = build(family(case), model, noise, make_meta(case), devices, settings)
        del model
        self.reference, self.state = built.reference, built.make_state(params)
        del params
        self.batch, self.key = jax.device_put(
            (make_batch(case), jax.random.key(0)), meshes.replicated(devices)
        )
        began = time.perf_counter()
        jitted = built.make_update(self.state)
        arguments = (self.state, self.reference, self.batch, self.key)
        self.compiled = jitted.lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - began
        self.metrics: dict[str, Any] = {}

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.state, self.metrics = self.compiled(
                self.state, self.reference, self.batch, self.key
            )
        jax.block_until_ready((self.state, self.metrics))


def family(case: dict[str, Any]) -> Family:
    return SDXL if case["pooled"] else SD


def make_meta(case: dict[str, Any]) -> EncodedMeta:
    """Makes the metadata of pairs as `make_batch` draws them."""
    return EncodedMeta.expected(
        family(case),
        family(case).facts(case["unet"]),
        size=(case["latents"],) * 2,
        latent_channels=case["unet"]["in_channels"],
        tokens=case["tokens"],
        scaling_factor=1.0,
        moments_dtype="float32",
    )


def make_batch(case: dict[str, Any]) -> PairBatch:
    pairs, side, channels = case["batch_size"], case["latents"], case["unet"]["in_channels"]
    keys = jax.random.split(jax.random.key(1), 3)
    mean = jax.random.normal(keys[0], (pairs, 2, side, side, channels))
    conditioning = Condition(jax.random.normal(keys[1], (pairs, case["tokens"], case["context"])))
    if case["pooled"]:
        sizes = jnp.array([16.0 * side] * 2 + [0.0] * 2 + [8.0 * side] * 2)
        conditioning = conditioning._replace(
            pooled=jax.random.normal(keys[2], (pairs, case["pooled"])),
            sizes=jnp.broadcast_to(sizes, (pairs, 2, 6)),
        )
    moments = jnp.concatenate([mean, jnp.full_like(mean, -20.0)], axis=-1)
    return PairBatch(moments, jnp.ones(pairs), conditioning)


def matmul_flops(side: int, blocks: int = 5, products: int = 10) -> float:
    """Measures FLOP/s of a bfloat16 product of two [side, side]: the best of some blocks."""
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys)
    product, best = jax.jit(jnp.matmul), math.inf
    for _ in range(blocks + 1):
        began = time.perf_counter()
        jax.block_until_ready([product(a, b) for _ in range(products)][-1])
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 * products / best


def pair_flops(case: dict[str, Any]) -> int:
    """Counts the FLOPs of one pair without recomputation; the same for both sides."""
    model = parameters.abstract(family(case).model, case["unet"])
    forward = flops.forward_flops(family(case), model, make_meta(case))
    return flops.step_flops(forward, needs_reference=True, needs_rejected=True)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    (platform,) = {device.platform for device in jax.devices()}
    if platform == "cpu" and not case["tiny"]:
        raise SystemExit("JAX sees no GPU: install dmpo_jax[cuda] on a machine with one")
    rate = matmul_flops(case["matmul"])
    side = OurStep(case)
    began = time.perf_counter()
    side.run(1)
    first = time.perf_counter() - began
    u = 0.5 * case["beta"] * float(side.metrics["margin_abs_max"])
    side.run(case["warmup"])
    began = time.perf_counter()
    side.run(case["steps"])
    seconds = (time.perf_counter() - began) / case["steps"]
    analysis: Any = side.compiled.memory_analysis()
    held = memory()
    return {
        "seconds": seconds,
        "first_step_seconds": side.compile_seconds + first,
        "peak_gb": held.get("device_memory_peak_gb", held.get("host_memory_peak_gb")),
        "arguments_gb": analysis.argument_size_in_bytes / 1e9,
        "temporaries_gb": analysis.temp_size_in_bytes / 1e9,
        "matmul_flops": rate,
        "max_u_at_step_0": u,
        "pair_flops": pair_flops(case),
        "device": jax.devices()[0].device_kind,
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    jax.config.update("jax_compilation_cache_dir", given["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    print(json.dumps(measure(given)))
