"""One DMPO update on a GPU: ours against the same in PyTorch, eager and compiled.

    python benchmarks/speed/gpu_step.py [--cases sd15:8:none sdxl:4:transformer] [--rounds 3]
    python benchmarks/speed/gpu_step.py --tiny       # on a CPU: tests this program

A case is MODEL:PAIRS:REMAT. Both sides have the same shapes (SD1.5 at 512², SDXL at 1024²),
random weights, bfloat16 compute over float32 master weights and AdamW, and a frozen bfloat16
reference. A REMAT other than none is gradient checkpointing in diffusers, which keeps what ours
keeps with "transformer". our_step.py and torch_step.py are the two sides.

Every number comes from a separate process, so that peak memory is its own. The sides take turns,
round by round; compiled programs are cached from the first round on. Reported are medians, with
minimum and maximum. MFU is the analytic FLOPs of a pair without recomputation, over the best rate
that either framework reached in a bfloat16 product of 8192 x 8192 on the same card. The cell of a
side that runs out of memory says so.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from typing import Any

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "results" / "gpu_step.json"
SIDES = ("ours", "eager", "compiled")
MODELS: dict[str, dict[str, Any]] = {
    "sd15": {"latents": 64, "tokens": 77, "context": 768, "pooled": 0},
    "sdxl": {"latents": 128, "tokens": 77, "context": 2048, "pooled": 1280},
}
CASES = ["sd15:4:none", "sd15:8:none", "sd15:16:transformer"]
CASES += ["sdxl:1:transformer", "sdxl:2:transformer", "sdxl:4:transformer"]
STEP = {"beta": 2000.0, "alpha": 0.01, "learning_rate": 1e-5}


def main() -> None:
    args = parse_args()
    if not args.tiny:
        require_gpu()
    result: dict[str, Any] = {"environment": environment(args), "runs": []}
    if args.resume and args.out.exists():
        result = json.loads(args.out.read_text())
    done = {(r["case"], r["side"], r["round"]) for r in result["runs"]}
    with tempfile.TemporaryDirectory() as temporary:
        cache = args.cache or temporary
        for case in args.cases:
            for i in range(args.rounds):
                for side in args.sides if i % 2 else args.sides[::-1]:
                    if (case, side, i) in done:
                        continue
                    measured = run_side(side, make_case(case, side, cache, args), cache)
                    result["runs"].append({"case": case, "side": side, "round": i, **measured})
                    shown = measured.get("error") or f"{1e3 * measured['seconds']:.1f} ms a step"
                    print(f"{case} {side} round {i}: {shown}", flush=True)
                    result["table"] = summarise(result["runs"])
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result["table"], args.tiny)
    print(f"written to {args.out}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", help=f"MODEL:PAIRS:REMAT ({' '.join(CASES)})")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, help="of each side, alternating (3)")
    parser.add_argument("--steps", type=int, help="timed steps a round (10)")
    parser.add_argument("--attention", default="cudnn", help="our kernel (cudnn)")
    parser.add_argument("--scan", action="store_true", help="our transformer blocks in a loop")
    parser.add_argument("--cache", help="folder of compiled programs; a temporary one by default")
    parser.add_argument("--resume", action="store_true", help="keep the rounds that --out has")
    parser.add_argument("--tiny", action="store_true", help="tests this program, on a CPU")
    parser.add_argument("--out", type=pathlib.Path, help=f"({RESULTS})")
    args = parser.parse_args()
    args.cases = args.cases or (["sd15:2:none", "sdxl:1:transformer"] if args.tiny else CASES)
    args.rounds = args.rounds or (1 if args.tiny else 3)
    args.steps = args.steps or (1 if args.tiny else 10)
    if args.tiny and args.out is None:
        parser.error("--tiny measures nothing: say with --out where its numbers go")
    args.out = args.out or RESULTS
    for case in args.cases:
        model, _, rest = case.partition(":")
        pairs, _, remat = rest.partition(":")
        if model not in MODELS or not pairs.isdecimal() or not int(pairs) or not remat:
            parser.error(f"a case must be MODEL:PAIRS:REMAT, MODEL one of sd15, sdxl; got {case}")
    return args


def require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            "this benchmark needs an NVIDIA GPU that PyTorch sees, and there is none here: run it "
            "on a machine with one, or test its plumbing with --tiny, which measures nothing"
        )


def make_case(case: str, side: str, cache: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of a side's process, JSON-serialisable."""
    name, pairs, remat = case.split(":")
    model: dict[str, Any] = {**MODELS[name], "unet": unet_config(name, args.tiny)}
    if args.tiny:
        model |= {"latents": 8, "tokens": 5, "context": model["unet"]["cross_attention_dim"]}
        model["pooled"] = min(model["pooled"], 24)
    return {
        **model,
        **STEP,
        "batch_size": int(pairs),
        "remat": remat,
        "attention": "plain" if args.tiny else args.attention,
        "scan": args.scan,
        "compile": side == "compiled",
        "warmup": 0 if args.tiny else 3,
        "steps": args.steps,
        "matmul": 128 if args.tiny else 8192,
        "cache": cache,
        "tiny": args.tiny,
    }


def unet_config(name: str, tiny: bool) -> dict[str, Any]:
    """Returns the published model's config, or that of a tiny model of the same kind."""
    from dmpo_jax.families import PUBLISHED

    if tiny:
        small = PUBLISHED[name].family.tiny.model
        return {"in_channels": 4, "norm_num_groups": 4, "layers_per_block": 1, **small}
    return {"in_channels": 4, **PUBLISHED[name].model}


def run_side(side: str, case: dict[str, Any], cache: str) -> dict[str, Any]:
    """Runs a side in a separate process; returns its measurements, or {"error": message}."""
    program = HERE / ("our_step.py" if side == "ours" else "torch_step.py")
    environ = {
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        # JAX takes three quarters of the card by default; a trainer alone on it can use all.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        **os.environ,
    }
    if case["tiny"]:
        environ["JAX_PLATFORMS"] = "cpu"
    paths = [str(HERE.parents[1]), environ.get("PYTHONPATH", "")]
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(case)],
        env=environ,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "out of memory" in done.stderr.lower() or "RESOURCE_EXHAUSTED" in done.stderr:
        return {"error": "out of memory"}
    raise SystemExit(f"{program.name} failed on {case['batch_size']} pairs:\n{done.stderr[-4000:]}")


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Makes a row per case and side: medians over its rounds, and its time over ours."""
    best = max((r["matmul_flops"] for r in runs if "error" not in r), default=0.0)
    work = {r["case"]: r["pair_flops"] for r in runs if "pair_flops" in r}
    rows = []
    for case, side in dict.fromkeys((r["case"], r["side"]) for r in runs):
        mine = [r for r in runs if (r["case"], r["side"]) == (case, side)]
        row: dict[str, Any] = {"case": case, "side": side}
        if errors := [r["error"] for r in mine if "error" in r]:
            rows.append({**row, "error": errors[0]})
            continue
        seconds = [r["seconds"] for r in mine]
        pairs, median = int(case.split(":")[1]), statistics.median(seconds)
        rows.append(
            {
                **row,
                "milliseconds": 1e3 * median,
                "milliseconds_min_max": [1e3 * min(seconds), 1e3 * max(seconds)],
                "pairs_per_second": pairs / median,
                "mfu": pairs / median * work[case] / best if case in work else None,
                "peak_gb": max(r["peak_gb"] for r in mine),
                "max_u_at_step_0": max(r["max_u_at_step_0"] for r in mine),
                "first_step_seconds": mine[0]["first_step_seconds"],
            }
        )
    ours = {r["case"]: r["milliseconds"] for r in rows if r["side"] == "ours" and len(r) > 3}
    for row in rows:
        if row["case"] in ours and "milliseconds" in row:
            row["times_ours"] = row["milliseconds"] / ours[row["case"]]
    return rows


def environment(args: argparse.Namespace) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers")
    return {
        "packages": {name: version(name) for name in packages},
        "rounds": args.rounds,
        "steps_a_round": args.steps,
        "attention": args.attention,
        "scan": args.scan,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "measurement": not args.tiny,
    }


def print_table(rows: list[dict[str, Any]], tiny: bool) -> None:
    if tiny:
        print("tiny models on a CPU: NO MEASUREMENT, this only shows that the program runs")
    header = ("case", "side", "ms a step", "(min, max)", "pairs/s", "MFU", "GB", "max|u|", "x ours")
    print("{:<20}{:<10}{:>10}{:>20}{:>9}{:>8}{:>7}{:>10}{:>8}".format(*header))
    for row in rows:
        start = f"{row['case']:<20}{row['side']:<10}"
        if "error" in row:
            print(f"{start}{row['error']}")
            continue
        low, high = row["milliseconds_min_max"]
        mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] is not None else ""
        ratio = f"{row['times_ours']:.2f}" if "times_ours" in row else ""
        print(
            f"{start}{row['milliseconds']:>10.1f}{f'({low:.1f}, {high:.1f})':>20}"
            f"{row['pairs_per_second']:>9.2f}{mfu:>8}{row['peak_gb']:>7.1f}"
            f"{row['max_u_at_step_0']:>10.2g}{ratio:>8}"
        )


if __name__ == "__main__":
    main()
