"""One DMPO update on the CPU: ours against the same in PyTorch.

    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1       # huge pages, for both sides
    python benchmarks/speed/cpu_step.py                # the digits UNet, 64 pairs, AdamW
    python benchmarks/speed/cpu_step.py --size=sd15    # SD1.5's UNet at 64 px, one pair, SGD: 13 GB

Both sides start from the same weights and get the same noised pairs. Their losses and gradient
norms must agree, or no ratio is reported. Rounds alternate, so that a busy machine slows both.
The ratio is torch / ours: above 1, ours is faster. PyTorch runs eagerly, in the faster of its
memory formats and with the fastest implementation of its optimizer. It is spared the noising,
the health metrics and the check for a non-finite update.

SD1.5's 860 million parameters, their gradients and the reference are 10.3 GB in float32.
AdamW's moments would not fit beside them in 16 GB, so both sides update by SGD, and each
round of a side is a separate process. Core seconds are reported beside seconds.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from cpu_sides import Ours, Size, Torch, environment, peak_resident_mb, size_of, write_reference

RESULTS = pathlib.Path(__file__).parents[1] / "results"
SIDES = ("ours", "torch")
PLAIN = "contiguous,default"


def main() -> None:
    args = parse_args()
    size = size_of(args.size)
    rounds, steps = args.rounds or size.rounds, args.steps or size.steps
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    import jax

    jax.config.update("jax_num_cpu_devices", size.devices or args.threads)
    if args.worker:
        print(json.dumps(work(args, size, steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = args.folder or folder
        if not os.path.exists(f"{args.folder}/config.json"):
            write_reference(args.folder, size)
        result = (together if size.together else apart)(args, size, rounds, steps)
    result["environment"] = environment() | {
        "size": args.size,
        "threads": args.threads,
        "pairs": size.batch,
        "optimizer": size.optimizer,
        "rounds": rounds,
        "steps_a_round": steps,
    }
    name = "cpu_step.json" if args.size == "digits" else f"cpu_step_{args.size}.json"
    out = args.out or RESULTS / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)
    print(f"written to {out}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--size", choices=("digits", "sd15"), default="digits", help="(digits)")
    parser.add_argument("--rounds", type=int, help="of each side, alternating (15; sd15: 3)")
    parser.add_argument("--steps", type=int, help="timed steps a round (5; sd15: 3)")
    parser.add_argument("--threads", type=int, default=cores, help=f"of both sides ({cores})")
    parser.add_argument("--out", type=pathlib.Path, help=f"(in {RESULTS})")
    parser.add_argument("--folder", help="of the UNet, kept between runs (a temporary one)")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--choice", default=PLAIN, help=argparse.SUPPRESS)
    return parser.parse_args()


def timed(side: Ours | Torch, steps: int) -> tuple[float, float]:
    """Measures (seconds, core seconds) per step."""
    wall, core = time.perf_counter(), time.process_time()
    side.run(steps)
    return (time.perf_counter() - wall) / steps, (time.process_time() - core) / steps


def together(args: argparse.Namespace, size: Size, rounds: int, steps: int) -> dict[str, Any]:
    """Runs both sides in this process, in turns; measures memory in separate processes."""
    ours = Ours(args.folder, size)
    ours.compile()
    noised = ours.noised()
    choice = quickest([PLAIN, "channels_last,default"], args, size, noised)
    layout, _ = choice.split(",")
    choice = quickest([f"{layout},{kind}" for kind in Torch.KINDS], args, size, noised)
    other = Torch(args.folder, size, args.threads, noised, choice=choice)
    sides = {"ours": ours, "torch": other}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for _ in range(3):
        other.give(ours.noised())
        for name, side in sides.items():
            side.run(1)
            seen[name].append(side.seen())
    check_agreement(seen, size.first)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for i in range(rounds):
        for name in SIDES if i % 2 else SIDES[::-1]:
            sides[name].run(1)  # wakes this side's threads, lets the other's go to sleep
            times[name].append(timed(sides[name], steps))
    flops, floor = ours.flops(), floors(size)
    memory = {name: call_worker(args, name, choice, 3) for name in SIDES}
    return summary(size, times, flops, seen, memory, choice) | {"floor_gflops": floor}


def apart(args: argparse.Namespace, size: Size, rounds: int, steps: int) -> dict[str, Any]:
    """Runs each round of a side in a separate process: two would not fit in memory."""
    memory = {"ours": call_worker(args, "ours", PLAIN, steps)}  # also writes the noised pairs
    tried = {
        choice: call_worker(args, "torch", choice, steps)
        for choice in (PLAIN, "channels_last,default", "contiguous,fused")
    }
    choice = min(tried, key=lambda choice: statistics.median(x for x, _ in tried[choice]["times"]))
    memory["torch"] = tried[choice]
    seen = {name: memory[name]["seen"] for name in SIDES}
    check_agreement(seen, size.first)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for i in range(rounds):
        for name in SIDES if i % 2 else SIDES[::-1]:
            done = call_worker(args, name, choice, steps)["times"]
            times[name].append((statistics.median(x for x, _ in done), min(y for _, y in done)))
    return summary(size, times, memory["ours"]["flops"], seen, memory, choice)


def call_worker(args: argparse.Namespace, side: str, choice: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", side, "--folder", args.folder]
    command += ["--size", args.size, "--threads", str(args.threads), "--steps", str(steps)]
    done = subprocess.run([*command, "--choice", choice], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def work(args: argparse.Namespace, size: Size, steps: int) -> dict[str, Any]:
    """Runs one side: a warm-up step, then `steps` timed ones; records peak resident MB."""
    result: dict[str, Any] = {"times": [], "seen": []}
    noised = pathlib.Path(args.folder) / "noised"
    noised.mkdir(exist_ok=True)
    if args.worker == "ours":
        side = Ours(args.folder, size)
        result["loaded_mb"] = peak_resident_mb()
        start = time.perf_counter()
        side.compile()
        result["compile_seconds"] = time.perf_counter() - start
        result["compile_peak_mb"] = peak_resident_mb()
        result["flops"] = side.flops()
    else:
        side = Torch(args.folder, size, args.threads, read(noised, 0), choice=args.choice)
        result["loaded_mb"] = peak_resident_mb()
    for i in range(steps + 1):
        if isinstance(side, Torch):
            side.give(read(noised, i))
        else:
            np.savez(noised / f"{i}.npz", *side.noised())
        if i == 0:
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        result["times"].append(timed(side, 1))
        result["seen"].append(side.seen())
    result["times"] = result["times"][1:]
    return result | {"peak_mb": peak_resident_mb()}


def read(folder: pathlib.Path, step: int) -> list[np.ndarray]:
    with np.load(folder / f"{step}.npz") as arrays:
        return [arrays[name] for name in arrays.files]


def quickest(choices: list[str], args: argparse.Namespace, size: Size, noised) -> str:
    """Returns the choice with the smallest of a few step times."""

    def best(choice: str) -> float:
        side = Torch(args.folder, size, args.threads, noised, choice=choice)
        # The first, which warms up, is never the smallest.
        return min(timed(side, 1)[0] for _ in range(4))

    return min(choices, key=best)


def check_agreement(seen: dict[str, list[dict[str, float]]], first: float = 1e-4) -> None:
    """Checks losses and gradient norms of the first steps, from equal weights and noise.

    first: relative tolerance of the first step.

    Raises:
        ValueError: if they differ by more than rounding; the times would be meaningless.
    """
    for i, (ours, other) in enumerate(zip(seen["ours"], seen["torch"], strict=True)):
        for name, value in ours.items():
            # beta carries rounding of 1e-6 into the gradients, the optimizer into later steps.
            tolerance = first if i == 0 else 1e-2
            if not math.isclose(value, other[name], rel_tol=tolerance, abs_tol=tolerance):
                raise ValueError(
                    f"step {i}: {name} should be equal, got ours {value}, torch {other[name]}"
                )


def summary(size: Size, times, flops: int, seen, memory, choice: str) -> dict[str, Any]:
    ratios = [t[0] / o[0] for o, t in zip(times["ours"], times["torch"], strict=True)]
    median = {
        name: [statistics.median(x) for x in zip(*times[name], strict=True)] for name in SIDES
    }
    result: dict[str, Any] = {
        "ratio": median["torch"][0] / median["ours"][0],
        "ratio_of_rounds": [min(ratios), statistics.median(ratios), max(ratios)],
        "ratio_of_core_seconds": median["torch"][1] / median["ours"][1],
        "flops_per_step": flops,
        "agreement": seen,
    }
    for name in SIDES:
        seconds, core = median[name]
        held = ("loaded_mb", "compile_peak_mb", "peak_mb", "compile_seconds")
        result[name] = {
            "milliseconds": 1e3 * seconds,
            "milliseconds_best": 1e3 * min(x for x, _ in times[name]),
            "milliseconds_of_a_core": 1e3 * core,
            "pairs_per_second": size.batch / seconds,
            "gflops": flops / seconds / 1e9,
            **{key: memory[name][key] for key in held if key in memory[name]},
        }
    result["torch"]["choice"] = choice
    return result


def floors(size: Size) -> dict[str, float]:
    """Measures GFLOP/s of one large matrix product and of the UNet's 64-channel convolution."""
    import jax
    import jax.numpy as jnp
    import torch

    def best(call, flops: int) -> float:
        call()
        times = []
        for _ in range(20):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return flops / min(times) / 1e9

    n, side, c = 2 * size.batch, size.side // 2, 64
    a, x, w = (
        np.random.default_rng(0).normal(size=shape).astype(np.float32)
        for shape in ((1024, 1024), (n, side, side, c), (3, 3, c, c))
    )
    dot = jax.jit(jnp.matmul)
    conv = jax.jit(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    ja, jx, jw = map(jnp.asarray, (a, x, w))
    ta = torch.from_numpy(a)
    tx = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    tw = torch.from_numpy(w).permute(3, 2, 0, 1).contiguous()
    dot_flops, conv_flops = 2 * 1024**3, 2 * n * side * side * 9 * c * c
    with torch.no_grad():
        return {
            "ours_matmul": best(lambda: dot(ja, ja).block_until_ready(), dot_flops),
            "torch_matmul": best(lambda: ta @ ta, dot_flops),
            "ours_conv": best(lambda: conv(jx, jw).block_until_ready(), conv_flops),
            "torch_conv": best(lambda: torch.nn.functional.conv2d(tx, tw, padding=1), conv_flops),
        }


def print_table(result: dict[str, Any]) -> None:
    rows = [
        ("step, median ms", "milliseconds", ".1f"),
        ("step, best ms", "milliseconds_best", ".1f"),
        ("step, core ms", "milliseconds_of_a_core", ".1f"),
        ("pairs/s", "pairs_per_second", ".2f"),
        ("GFLOP/s", "gflops", ".1f"),
        ("memory, loaded MB", "loaded_mb", ".0f"),
        ("memory, stepping MB", "peak_mb", ".0f"),
    ]
    print(f"{'':<22}{'ours':>10}{'torch':>10}")
    for label, key, form in rows:
        cells = (format(result[name][key], form) for name in SIDES)
        print(f"{label:<22}" + "".join(f"{cell:>10}" for cell in cells))
    for kind in ("matmul", "conv") if "floor_gflops" in result else ():
        cells = (result["floor_gflops"][f"{name}_{kind}"] for name in SIDES)
        print(f"{kind + ' alone, GFLOP/s':<22}" + "".join(f"{cell:>10.1f}" for cell in cells))
    low, _, high = result["ratio_of_rounds"]
    print(f"torch / ours: {result['ratio']:.2f} (rounds {low:.2f} to {high:.2f})")
    print(f"torch / ours in seconds of a core: {result['ratio_of_core_seconds']:.2f}")
    print(f"{result['flops_per_step'] / 1e9:.2f} GFLOP a step; torch: {result['torch']['choice']}")
    ours = result["ours"]
    print(f"compiling ours: {ours['compile_seconds']:.1f} s, {ours['compile_peak_mb']:.0f} MB")


if __name__ == "__main__":
    main()
