"""Cost of the health metrics: the digits step with all of them against one with the loss alone.

    python benchmarks/speed/health_cost.py            # some minutes on 2 cores

Both sides read their metrics after every update and process them as a run's log does, in
alternating rounds within one process. Prints the ratio, and writes results/health_cost.json.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any
from unittest import mock

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "results" / "health_cost.json"


def without_health() -> Any:
    """Returns a patch under which the step computes loss and gradient norm alone."""
    import jax.numpy as jnp

    from dmpo_jax.training import health, step

    class Bare:
        FIELDS = health.FIELDS[:1]

        @staticmethod
        def by_pair(policy, reference, target, preference, timesteps, losses):
            return jnp.zeros((1, 1))

        @staticmethod
        def summary(pairs, **kinds):
            return {}

    return mock.patch.object(step, "health", Bare)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12, help="of each side, in turns")
    parser.add_argument("--steps", type=int, default=5, help="updates a round")
    given = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    import cpu_sides
    import jax

    from dmpo_jax.training import health

    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))

    size = cpu_sides.size_of("digits")
    curves = health.Curves(beta=cpu_sides.BETA, alpha=cpu_sides.ALPHA, timesteps=1000)

    def whole_round(side) -> float:
        began = time.perf_counter()
        for i in range(given.steps):
            side.run(1)
            fetched = jax.device_get(side.metrics)
            if "margin" in fetched:
                curves.add(fetched["pairs"])
                if i == given.steps - 1:
                    curves.take()
        return (time.perf_counter() - began) / given.steps

    with tempfile.TemporaryDirectory() as folder:
        cpu_sides.write_reference(folder, size)
        whole = cpu_sides.Ours(folder, size)
        whole.compile()
        with without_health():
            bare = cpu_sides.Ours(folder, size)
            bare.compile()
    for side in (whole, bare):
        whole_round(side)
    pairs = []
    for i in range(given.rounds):
        order = (whole, bare) if i % 2 else (bare, whole)
        times = {side is whole: whole_round(side) for side in order}
        pairs.append((times[True], times[False]))
        print(f"round {i + 1}: {times[True]:.4f} s with, {times[False]:.4f} s without", flush=True)
    ratios = [a / b for a, b in pairs]
    result = {
        "cost": statistics.median(ratios) - 1,
        "ratios": ratios,
        "seconds_with": statistics.median(a for a, _ in pairs),
        "seconds_without": statistics.median(b for _, b in pairs),
        "best_with": min(a for a, _ in pairs),
        "best_without": min(b for _, b in pairs),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"health metrics cost {100 * result['cost']:+.2f} % of a step (median of the rounds)")


if __name__ == "__main__":
    main()
