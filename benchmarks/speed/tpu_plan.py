"""Plans of our step from the real TPU compiler: memory, collectives, time, gain of each lever.

    python benchmarks/speed/tpu_plan.py                     # rows that are missing, minutes each
    python benchmarks/speed/tpu_plan.py sdxl-full-v5e-4x4   # one row, or several
    python benchmarks/speed/tpu_plan.py --table             # earlier measurements, as a table
    python benchmarks/speed/tpu_plan.py --tiny ROW ...      # the same at tiny width, as a trial

Requires libtpu, but no TPU. Each row runs `launch/plan.py` in a separate process, so that its
time and peak memory are its own. Results go to results/tpu_plan.json; a later one replaces an
earlier one of the same row. --dump keeps XLA's texts.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE.parent / "results" / "tpu_plan.json"
SD15 = {"model": "sd15", "topology": "v5p:2x2x2", "pairs": 4}
REPLICATED = {"mesh.data": 8, "mesh.fsdp": 1, "model.attention": "plain", "model.remat": "none"}
FSDP = {**REPLICATED, "mesh.data": 1, "mesh.fsdp": 8}
# SDXL compiles in reasonable time and memory only with its 70 blocks in loops.
LEAN = {"mesh.data": 1, "mesh.fsdp": -1, "model.remat": "transformer", "model.scan": True}
# Their configs have loops over blocks, and their recomputation, already.
SHARDED = {"mesh.data": 1, "mesh.fsdp": -1, "model.attention": "splash"}
LARGE = {**SHARDED, "data.resolution": 1024}  # others at 512 pixels a side
# name: (what is compiled, overrides of the config). Levers are config leaves. Not model.scan for
# SD1.5, whose transformers have one block each: the program is the same.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd15-yardstick-1": (SD15, {**REPLICATED, "model.remat": "transformer", "model.scan": True}),
    "sd15-plain": (SD15, REPLICATED),
    "sd15-fsdp": (SD15, FSDP),
    "sd15-remat-block": (SD15, {**REPLICATED, "model.remat": "block"}),
    "sd15-remat-transformer": (SD15, {**REPLICATED, "model.remat": "transformer"}),
    "sd15-offload": (SD15, {**REPLICATED, "model.remat": "offload"}),
    "sd15-splash": (SD15, {**REPLICATED, "model.attention": "splash"}),
    "sd15-best-memory": (
        SD15,
        {**FSDP, "model.attention": "splash", "model.remat": "transformer"},
    ),
    "sd15-splash-fsdp": (SD15, {**FSDP, "model.attention": "splash"}),
    "sdxl-full-v5e-4x4": (
        {"model": "sdxl", "topology": "v5e:4x4", "pairs": 1},
        {**LEAN, "model.attention": "splash"},
    ),
    "sdxl-full-v5p-2x2x1": (
        {"model": "sdxl", "topology": "v5p:2x2x1", "pairs": 8},
        {**LEAN, "model.attention": "splash"},
    ),
    "sdxl-lora-v5e-4x4": (
        {"model": "sdxl", "topology": "v5e:4x4", "pairs": 1, "variant": "lora"},
        {**LEAN, "model.attention": "splash"},
    ),
    "sd35-medium-full-v5e-4x4": (
        {"model": "sd35_medium", "topology": "v5e:4x4", "pairs": 1},
        LARGE,
    ),
    "klein-full-v5p-2x2x1": ({"model": "klein_4b", "topology": "v5p:2x2x1", "pairs": 1}, SHARDED),
    "klein-full-1024-v5p-2x2x1": (
        {"model": "klein_4b", "topology": "v5p:2x2x1", "pairs": 1},
        LARGE,
    ),
    "klein-lora-v5e-2x4": (
        {"model": "klein_4b", "topology": "v5e:2x4", "pairs": 1, "variant": "lora"},
        SHARDED,
    ),
    "klein-lora-1024-v5e-2x4": (
        {"model": "klein_4b", "topology": "v5e:2x4", "pairs": 1, "variant": "lora"},
        LARGE,
    ),
    "z-image-full-v5p-2x2x1": ({"model": "z_image", "topology": "v5p:2x2x1", "pairs": 1}, SHARDED),
    "z-image-full-1024-v5p-2x2x1": (
        {"model": "z_image", "topology": "v5p:2x2x1", "pairs": 1},
        LARGE,
    ),
    "z-image-lora-v5e-2x4": (
        {"model": "z_image", "topology": "v5e:2x4", "pairs": 1, "variant": "lora"},
        SHARDED,
    ),
    "z-image-lora-1024-v5e-2x4": (
        {"model": "z_image", "topology": "v5e:2x4", "pairs": 1, "variant": "lora"},
        LARGE,
    ),
}
# The config that trains a model.
CONFIGS = {
    "sd15": "sd15",
    "sdxl": "sdxl",
    "sd35_medium": "sd35",
    "klein_4b": "klein",
    "z_image": "z_image",
}
# Measured once with diffusers 0.36's Flax UNet in the same DMPO step, on 2 cores; diffusers has
# since removed that UNet. SDXL at 1 pair per chip was killed for memory after 26 minutes.
YARDSTICK_2 = {
    "row": "diffusers 0.36 Flax, SD1.5, 4 pairs a chip, v5p 2x2x2",
    "temporaries_gb": 23.0,
    "xla_seconds": 0.167,
    "xla_traffic_gb": 355.0,
    "compile_seconds": 656.0,
}


def command(name: str, tiny: bool) -> tuple[list[str], int]:
    """Returns the command line of a row, and its number of chips."""
    what, overrides = ROWS[name]
    chips = 1
    for side in re.findall(r"\d+", what["topology"].partition(":")[2]):
        chips *= int(side)
    config = f"{CONFIGS[what['model']]}_dmpo.py"
    return plan_line(what, overrides, config, chips, tiny), chips


def plan_line(
    what: dict[str, Any], overrides: dict[str, Any], config: str, chips: int, tiny: bool
) -> list[str]:
    """Returns the command line that plans a row. config: a file of configs/."""
    variant = ":debug" if tiny else f":{what['variant']}" if "variant" in what else ""
    leaves = {**overrides, "train.batch_size": what["pairs"] * chips}
    if tiny and what.get("variant") == "lora":
        leaves["lora.rank"] = 4
    flags = [f"--config.{path}={value}" for path, value in leaves.items()]
    if not tiny:
        flags.append(f"--model={what['model']}")
    program = [sys.executable, str(ROOT / "launch" / "plan.py")]
    path = f"--config={ROOT / 'configs' / config}{variant}"
    return [*program, path, f"--topology={what['topology']}", *flags]


def measure(name: str, tiny: bool, dump: str) -> dict[str, Any]:
    """Measures one row in a separate process."""
    return run_plan(name, command(name, tiny)[0], tiny, dumping(dump, name))


def run_plan(name: str, line: list[str], tiny: bool, environ: dict[str, str]) -> dict[str, Any]:
    """Runs a command line that plans one topology; returns its plan, time and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "plan.json"
        line = [*line, f"--out={out}", f"--cache={folder}/cache"]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            **environ,
        }
        began = time.monotonic()
        process = subprocess.Popen(line, env=environment)
        # Usage of this child only: RUSAGE_CHILDREN would hold the largest of all children.
        _, status, usage = os.wait4(process.pid, 0)
        took = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        about = {"row": name, "tiny": tiny, "seconds": took, "peak_gb": usage.ru_maxrss / 1e6}
        if process.returncode:
            return {**about, "failed": process.returncode}
        (plan,) = json.loads(out.read_text())
    return {**about, "plan": plan}


def table(results: list[dict[str, Any]]) -> str:
    """Formats results as Markdown, one per row, yardstick 2 first."""
    head = (
        "row",
        "pairs/chip",
        "arguments GB",
        "temporaries GB",
        "fits",
        "XLA's s",
        "modelled s",
        "TFLOP/chip",
        "memory traffic GB",
        "kernels",
        "all-gather",
        "reduce-scatter",
        "all-reduce",
        "all-to-all",
        "permute",
        "on activations",
        "minutes",
        "host GB",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    known = YARDSTICK_2
    cells = [known["row"], "4", "", f"{known['temporaries_gb']:.1f}", ""]
    cells += [f"{known['xla_seconds']:.3f}", "", "", f"{known['xla_traffic_gb']:.0f}"]
    cells += [""] * 7 + [f"{known['compile_seconds'] / 60:.1f}", ""]
    lines.append("| " + " | ".join(cells) + " |")
    for one in results:
        lines.append("| " + " | ".join(cells_of(one)) + " |")
    return "\n".join(lines)


def cells_of(one: dict[str, Any]) -> list[str]:
    name = one["row"] + (" (tiny)" if one["tiny"] else "")
    costs = [f"{one['seconds'] / 60:.1f}", f"{one['peak_gb']:.1f}"]
    if "failed" in one:
        return [name, f"failed with status {one['failed']}", *[""] * 14, *costs]
    plan = one["plan"]
    memory, times, rows = plan["memory"], plan["time"], plan["collectives"]

    def runs(kind: str) -> str:
        return "?" if rows is None else str(sum(r["runs"] for r in rows if r["kind"] == kind))

    activations = [r["runs"] for r in rows or () if r["moves"] == "activations"]
    estimate = plan["xla"].get("optimal_seconds")
    traffic = plan["xla"].get("traffic_with_loops")
    return [
        name,
        f"{plan['pairs_per_chip']:g}",
        f"{memory['arguments'] / 1e9:.2f}",
        f"{memory['temporaries'] / 1e9:.2f}",
        "yes" if memory["fits"] else "NO",
        "?" if estimate is None else f"{estimate:.3f}",
        "?" if not times else f"{times['low']:.3f}-{times['high']:.3f}",
        f"{plan['flops']['chip_executed'] / 1e12:.1f}",
        "?" if traffic is None else f"{traffic / 1e9:.0f}",
        str(plan["xla"].get("kernels", "?")),
        *[runs(k) for k in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")],
        runs("collective-permute"),
        "?" if rows is None else str(sum(activations)),
        *costs,
    ]


def plan_rows(
    about: str,
    rows: Mapping[str, Any],
    path: pathlib.Path,
    measure: Callable[[str, bool, str], dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Runs a command that plans rows, and prints the table of all results.

    Args:
        about: help of the command. path: of the results, written after every row, so that a
            killed run goes on where it stopped.
        measure: (row, tiny, folder for XLA's texts or "") -> its result.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(rows)}; default: those missing")
    parser.add_argument("--table", action="store_true", help="plan nothing, print what was")
    parser.add_argument("--tiny", action="store_true", help="debug-size models")
    parser.add_argument("--dump", default="", help="a folder for XLA's texts")
    given = parser.parse_args()
    if unknown := sorted(set(given.rows) - set(rows)):
        parser.error(f"there are no rows {unknown}; there are {', '.join(rows)}")
    results = json.loads(path.read_text()) if path.exists() else []
    done = {one["row"] for one in results if "failed" not in one}
    for name in () if given.table else given.rows or [row for row in rows if row not in done]:
        print(f"{name} ...", flush=True)
        new = measure(name, given.tiny, given.dump)
        kept = [r for r in results if (r["row"], r["tiny"]) != (name, given.tiny)]
        results = [*kept, new]
        if not given.tiny:  # a trial is not a result
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def dumping(folder: str, name: str) -> dict[str, str]:
    """Returns the environment in which XLA writes the texts of a row's step; {} for ""."""
    if not folder:
        return {}
    flags = f"--xla_dump_to={pathlib.Path(folder) / name} --xla_dump_hlo_module_re=jit_train_step"
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}


if __name__ == "__main__":
    plan_rows(__doc__ or "", ROWS, RESULTS, measure, table)
