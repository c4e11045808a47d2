"""Time from starting the train command to its first step, fresh and from a checkpoint.

    python benchmarks/speed/start.py [--rounds 3]

Each start is a separate process, `launch/train.py` as a user runs it: with an empty compilation
cache (cold), with the cache that the previous start filled (warm), and again with the checkpoint
of that run (restart), cold and warm. The data are encoded beforehand, and no image grid is
drawn. Seconds are the run's own: from the start of its process, imports included, to the end of
its first step (`seconds_to_first_step` in metrics.jsonl). `seconds_compile` of these are spent on
compiling the step or reading it from the cache. Reported: medians, minimum and maximum.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "start.json"
QUIET = ["--config.log.sample_every=0", "--config.log.validate_every=0", "--config.log.every=1"]
# Flags of the timed starts, and of the command before them, which encodes the pairs.
CONFIGS = {
    "digits": [
        "--config=configs/digits_dmpo.py",
        "--config.collect.pairs=160",
        "--config.mesh.cpu_devices=1",
        # Every start raises train.steps, which other schedules require to match on resume.
        "--config.optimizer.schedule=constant",
    ],
}
STARTS = ("fresh, cold", "fresh, warm", "restart, cold", "restart, warm")
KEPT = ("seconds_to_first_step", "seconds_compile", "compiled_from_cache")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--rounds", type=int, default=3, help="of the four starts (3)")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help=f"({RESULTS})")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.configs:
            prepared = prepare(name, pathlib.Path(folder) / name)
            for i in range(args.rounds):
                for start, measured in four_starts(name, prepared):
                    runs.append({"config": name, "start": start, "round": i, **measured})
                    print(f"{name}, {start}: {measured}", flush=True)
    result = {"environment": environment(), "table": summarise(runs), "runs": runs}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result["table"])
    print(f"written to {args.out}")


def prepare(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Makes a workdir with the encoded pairs and nothing of a training run."""
    jobs = "--config.jobs=('collect','encode')"
    run(name, folder / "workdir", folder / "cache", jobs, "--config.train.steps=1")
    for left in ("checkpoints", "export"):
        shutil.rmtree(folder / "workdir" / left, ignore_errors=True)
    (folder / "workdir" / "metrics.jsonl").unlink(missing_ok=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return folder / "workdir"


def four_starts(name: str, prepared: pathlib.Path):
    """Yields (start, measurements of its first line of metrics) for each of STARTS, in turn."""
    with tempfile.TemporaryDirectory() as temporary:
        work, cache = pathlib.Path(temporary) / "work", pathlib.Path(temporary) / "cache"
        for i, start in enumerate(STARTS):
            kind, temperature = start.split(", ")
            if temperature == "cold":
                shutil.rmtree(cache, ignore_errors=True)
            if kind == "fresh":
                shutil.rmtree(work, ignore_errors=True)
                shutil.copytree(prepared, work)
            # A fresh run makes two steps; each restart makes two more.
            steps = 2 if kind == "fresh" else 2 * i
            jobs = "--config.jobs=('train',)"
            run(name, work, cache, jobs, f"--config.train.steps={steps}")
            lines = [json.loads(x) for x in (work / "metrics.jsonl").read_text().splitlines()]
            # Only a process's first line has the values that are measured once.
            first = [line for line in lines if "seconds_to_first_step" in line][-1]
            yield start, {name: first[name] for name in KEPT}


def run(name: str, workdir: pathlib.Path, cache: pathlib.Path, *flags: str) -> None:
    command = [sys.executable, "launch/train.py", f"--workdir={workdir}", *CONFIGS[name], *QUIET]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    done = subprocess.run([*command, *flags], cwd=ROOT, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join([*command, *flags])} failed:\n{done.stderr[-4000:]}")


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Makes a row per config and start: median, minimum and maximum over the rounds."""
    rows = []
    for config, start in dict.fromkeys((r["config"], r["start"]) for r in runs):
        mine = [r for r in runs if (r["config"], r["start"]) == (config, start)]
        row: dict[str, Any] = {"config": config, "start": start}
        for name in ("seconds_to_first_step", "seconds_compile"):
            values = [r[name] for r in mine]
            row[name] = [statistics.median(values), min(values), max(values)]
        rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.split(":")[1].strip() for line in lines if "model name" in line), ""),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_at_end": os.getloadavg()[0],
        "packages": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'config':<14}{'start':<16}{'to first step, s':>26}{'compiling, s':>26}")
    for row in rows:
        cells = [row[name] for name in ("seconds_to_first_step", "seconds_compile")]
        shown = (f"{median:.1f} ({low:.1f}, {high:.1f})" for median, low, high in cells)
        print(f"{row['config']:<14}{row['start']:<16}" + "".join(f"{x:>26}" for x in shown))


if __name__ == "__main__":
    main()
