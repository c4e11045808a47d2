"""Host memory and time of loading and exporting SDXL's UNet, 2.57 billion parameters.

    python benchmarks/memory/full_size_memory.py

Writes UNet folders of random numbers (at most 21 GB of disk), then loads and exports each in
a separate process. Peak is VmHWM of /proc/self/status: the maximum of resident memory, mapped
files included. It is reset between loading and exporting. (ru_maxrss would start from the
parent's memory.) The goal is 1.15 times the parameters as held, plus 1 GB. Files leave
the page cache before each load; exported ones need not have reached the disk. CPU seconds
are reported beside seconds, for machines that are shared.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

from dmpo_jax.families.sdxl import SDXL_BASE as SDXL

PARAMETERS = 2_567_463_684
RESULTS = pathlib.Path(__file__).parents[1] / "results" / "full_size_memory.json"
GIGA = 1e9


class Source(NamedTuple):
    dtype: str
    shard_bytes: int


class Case(NamedTuple):
    """One measurement. held: dtype of the parameters. exported: of the export, None as held."""

    source: str
    held: str
    devices: int
    exported: str | None


SOURCES = {
    "float16, one file": Source("float16", 2**40),
    "float16, sharded": Source("float16", 2**30),
    "float32, sharded": Source("float32", 5 * 2**30),
}
CASES = [
    Case("float16, one file", "float32", 1, None),
    Case("float16, one file", "bfloat16 kernels", 1, None),
    Case("float16, sharded", "float32", 1, "float16"),
    Case("float16, sharded", "float32", 8, None),
    Case("float32, sharded", "float32", 1, None),
    Case("float32, sharded", "bfloat16 kernels", 8, "float32"),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="where to write (a temporary folder)")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help=f"({RESULTS})")
    parser.add_argument("--write", help=argparse.SUPPRESS)  # what the child processes do
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write(pathlib.Path(args.folder), SOURCES[args.write])
    elif args.measure is not None:
        print(json.dumps(measure(pathlib.Path(args.folder), CASES[args.measure])))
    else:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows = compare(folder)
        machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
        print_table(rows)
        print(f"written to {args.out}")


def compare(folder: str) -> list[dict[str, Any]]:
    rows = []
    for name in SOURCES:
        run(folder, "--write", name)
        for i, case in enumerate(CASES):
            if case.source == name:
                rows.append({**case._asdict(), **json.loads(run(folder, "--measure", str(i)))})
                print(rows[-1], flush=True)
        shutil.rmtree(pathlib.Path(folder) / "source")
    return rows


def run(folder: str, *arguments: str) -> str:
    """Runs this program in a child process; returns the last line that it prints."""
    command = [sys.executable, __file__, "--folder", folder, *arguments]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(child.stderr)
    return (child.stdout.splitlines() or [""])[-1]


class Drawn:
    """An array drawn when NumPy asks for it, so that a model takes no memory."""

    def __init__(self, spec: Any, seed: int):
        self.shape, self.dtype, self.seed = spec.shape, spec.dtype, seed

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        return 0.02 * rng.standard_normal(self.shape, np.float32)


def write(folder: pathlib.Path, source: Source) -> None:
    from dmpo_jax import diffusers_io
    from dmpo_jax.models import parameters
    from dmpo_jax.models.unet import UNet2DConditionModel

    model = parameters.abstract(UNet2DConditionModel, SDXL)
    shapes = parameters.shapes(model)
    params = {path: Drawn(spec, i) for i, (path, spec) in enumerate(shapes.items())}
    diffusers_io.save_unet(
        model,
        folder / "source",
        params=params,
        dtype=np.dtype(source.dtype),
        shard_bytes=source.shard_bytes,
    )


def measure(folder: pathlib.Path, case: Case) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_num_cpu_devices", case.devices)
    from dmpo_jax import diffusers_io
    from dmpo_jax.models import parameters
    from dmpo_jax.parallel import meshes

    def mixed(path: str) -> Any:
        return jnp.bfloat16 if path.endswith(".kernel") else jnp.float32

    devices = meshes.make_mesh(data=1, fsdp=case.devices)
    drop_cache(folder / "source")
    before = peak_bytes()
    start, cpu = time.monotonic(), time.process_time()
    model = diffusers_io.load_unet(
        folder / "source",
        param_dtype=jnp.float32 if case.held == "float32" else mixed,
        sharding=functools.partial(meshes.parameter_sharding, devices)
        if case.devices > 1
        else None,
    )
    load_seconds, load_peak = time.monotonic() - start, peak_bytes()
    load_cpu_seconds = time.process_time() - cpu
    params = parameters.split(model)[1]
    held = sum(s.data.nbytes for x in params.values() for s in x.addressable_shards)
    count = sum(x.size for x in params.values())
    if count != PARAMETERS:
        raise SystemExit(f"the UNet should have {PARAMETERS} parameters, but has {count}")

    pathlib.Path("/proc/self/clear_refs").write_text("5")
    start, cpu = time.monotonic(), time.process_time()
    dtype = None if case.exported is None else np.dtype(case.exported)
    diffusers_io.save_unet(model, folder / "export", dtype=dtype)
    export_seconds, export_peak = time.monotonic() - start, peak_bytes()
    export_cpu_seconds = time.process_time() - cpu
    written = sum(f.stat().st_size for f in (folder / "export").glob("*.safetensors"))
    diffusers_io.load_unet(folder / "export", abstract=True)  # complete, and of this model
    shutil.rmtree(folder / "export")
    return {
        "held_gb": held / GIGA,
        "goal_gb": 1.15 * held / GIGA + 1,
        "before_gb": before / GIGA,
        "load_peak_gb": load_peak / GIGA,
        "load_seconds": load_seconds,
        "load_cpu_seconds": load_cpu_seconds,
        "export_peak_gb": export_peak / GIGA,
        "export_seconds": export_seconds,
        "export_cpu_seconds": export_cpu_seconds,
        "exported_gb": written / GIGA,
    }


def peak_bytes() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def drop_cache(folder: pathlib.Path) -> None:
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # dirty pages would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def print_table(rows: list[dict[str, Any]]) -> None:
    print("GB, seconds (CPU seconds)")
    print(f"{'source':18} {'held':17} devices   held   goal | load peak         | export peak")
    for row in rows:
        met = max(row["load_peak_gb"], row["export_peak_gb"]) <= row["goal_gb"]
        print(
            f"{row['source']:18} {row['held']:17} {row['devices']:7} {row['held_gb']:6.2f} "
            f"{row['goal_gb']:6.2f} | {row['load_peak_gb']:6.2f} {row['load_seconds']:4.0f} "
            f"({row['load_cpu_seconds']:4.0f}) | {row['export_peak_gb']:6.2f} "
            f"{row['export_seconds']:4.0f} ({row['export_cpu_seconds']:4.0f})"
            f"{'' if met else '  above the goal'}"
        )


if __name__ == "__main__":
    main()
