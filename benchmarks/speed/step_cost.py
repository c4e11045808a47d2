"""Cost of an option: the digits step with it and the same step without, in turns.

    python benchmarks/speed/step_cost.py curves --rounds 40 --steps 4    # some minutes on 2 cores
    python benchmarks/speed/step_cost.py moving --rounds 40 --steps 4

curves: all health metrics against the loss and the gradient's norm alone; both sides read their
metrics after every update and process them as a run's log does. moving: a reference that follows
the policy, with decay 0.99, against a fixed one. Prints the ratio with its interval, and writes
results/step_cost.json.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "results" / "step_cost.json"


def without_curves() -> Any:
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


# name: settings of the step with the option, and a patch of the step without it.
OPTIONS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "curves": ({}, without_curves),
    "moving": ({"moving": (0.99, 1)}, contextlib.nullcontext),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("option", choices=list(OPTIONS))
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

    settings, without = OPTIONS[given.option]
    with tempfile.TemporaryDirectory() as folder:
        cpu_sides.write_reference(folder, size)
        sides = [cpu_sides.Ours(folder, size, **settings)]
        sides[0].compile()
        with without():
            sides.append(cpu_sides.Ours(folder, size))
            sides[1].compile()
    for side in sides:
        whole_round(side)
    pairs = []
    for i in range(given.rounds):
        order = sides if i % 2 else sides[::-1]
        times = {side is sides[0]: whole_round(side) for side in order}
        pairs.append((times[True], times[False]))
        print(f"round {i + 1}: {times[True]:.4f} s with, {times[False]:.4f} s without", flush=True)
    ratios = sorted(a / b for a, b in pairs)
    low, high = interval_of_median(len(ratios))
    result = {
        "cost": statistics.median(ratios) - 1,
        "interval": [ratios[low] - 1, ratios[high] - 1],
        "ratios": ratios,
        "seconds_with": statistics.median(a for a, _ in pairs),
        "seconds_without": statistics.median(b for _, b in pairs),
        "best_with": min(a for a, _ in pairs),
        "best_without": min(b for _, b in pairs),
    }
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**found, given.option: result}, indent=1) + "\n")
    between = " to ".join(f"{100 * x:+.2f}" for x in result["interval"])
    print(f"{given.option}: {100 * result['cost']:+.2f} % of a step (median; 95 % {between} %)")


def interval_of_median(count: int) -> tuple[int, int]:
    """Returns the places, in order, that hold the median with 95 %: of the binomial's quantiles."""
    from scipy import stats

    low = max(int(stats.binom.ppf(0.025, count, 0.5)) - 1, 0)
    return low, count - 1 - low


if __name__ == "__main__":
    main()
