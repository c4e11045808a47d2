"""Measures what an int8 reference does to the margins of a policy that has not moved.

    python benchmarks/study/int8_reference.py --workdir=DIR [--config=digits_flow_dmpo]

With `model.frozen_dtype=int8` and without LoRA the reference is rounded and the policy is not, so
that margins do not begin at 0. Collects and encodes pairs of the packaged digits, then measures
them at step 0, each pair under several timesteps and noises. Writes DIR/int8_reference.json.
"""

import argparse
from typing import Any

import jax
import numpy as np
from etils import epath

from dmpo_jax import storage
from dmpo_jax.config.files import load_config
from dmpo_jax.jobs import train
from dmpo_jax.jobs.run import run
from dmpo_jax.parallel import meshes
from dmpo_jax.training import health, step

PAIRS, NOISES = 128, 8
QUANTILES = (50, 95, 100)


def measure(config: Any, workdir: epath.Path) -> dict[str, float]:
    """Returns figures of u = beta x margin at step 0, and of the errors that it is made of."""
    config.jobs = ("collect", "encode")
    config.collect.pairs, config.train.batch_size = PAIRS, PAIRS // 2
    config.model.frozen_dtype, config.data.validation_fraction = "int8", 0.0
    config.log.sample_every = 0
    run(config, workdir)
    prepared, params = train.prepare(config, workdir)
    built = prepared.step
    setup = step.on_mesh(built.setup, built.mesh)

    @jax.jit
    def by_pair(params: Any, reference: Any, batch: Any, key: jax.Array) -> jax.Array:
        noised = step.noise_batch(key, batch, setup)
        both = step.predict_both(params, reference, noised, batch.condition, setup)
        return health.by_pair(
            *both, noised.target, batch.preference, noised.timesteps, batch.preference
        )

    tables, batches = [], prepared.batches()
    with jax.set_mesh(built.mesh):
        for i in range(2 * NOISES):
            size = config.train.batch_size
            batch = meshes.shard_batch(next(batches), built.batch_sharding(), size)
            key = jax.random.fold_in(prepared.key, i)
            tables.append(jax.device_get(by_pair(params, built.reference, batch, key)))
    rows = dict(zip(health.FIELDS, np.concatenate(tables, 1), strict=True))
    beta = config.objectives[config.objective].beta
    u = beta * rows["margin"]
    sizes = {f"u_abs_p{q}": float(np.percentile(np.abs(u), q)) for q in QUANTILES}
    return {
        "rows": len(u),
        "beta": beta,
        "u_mean": float(u.mean()),
        "u_std": float(u.std()),
        **sizes,
        # Of the policy over the reference: below 0, the rounded one predicts worse.
        "chosen_gain_over_error": float(rows["chosen_gain"].mean() / rows["chosen_error"].mean()),
        "accuracy": float((rows["margin"] > 0).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--config", default="digits_dmpo")
    given = parser.parse_args()
    workdir = epath.Path(given.workdir)
    found = measure(load_config(given.config), workdir)
    for name, value in found.items():
        print(f"{name:<24} {value:.4g}")
    storage.write_json(workdir / "int8_reference.json", found)


if __name__ == "__main__":
    main()
