"""Plans of our step from XLA's GPU compiler: memory, traffic, time by roofline. Needs no GPU.

    python benchmarks/speed/gpu_plan.py                    # the rows that are missing, minutes each
    python benchmarks/speed/gpu_plan.py sd15-full-h100-1   # one row again, or several
    python benchmarks/speed/gpu_plan.py --table            # earlier results, as a table
    python benchmarks/speed/gpu_plan.py --tiny ROW ...     # the same at tiny width, as a trial

Requires the extra [plan_gpu]. Each row runs `launch/plan.py` in a separate process, so that its
time and peak memory are its own. Results go to results/gpu_plan.json after every row, so that a
killed run goes on where it stopped. --dump keeps XLA's texts.
"""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from tpu_plan import CONFIGS, ROOT, plan_line, run_plan

RESULTS = ROOT / "benchmarks" / "results" / "gpu_plan.json"
ALONE = {"mesh.data": 1, "mesh.fsdp": 1}
# SDXL has 70 blocks: in loops it compiles in reasonable time.
LEAN = {"model.remat": "transformer", "model.scan": True}
# name: (what is compiled, overrides of the config). Attention is the config's: cuDNN's.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd15-full-h100-1": (
        {"model": "sd15", "topology": "h100:1", "pairs": 4},
        {**ALONE, "model.remat": "none"},
    ),
    "sdxl-full-h100-1": ({"model": "sdxl", "topology": "h100:1", "pairs": 4}, {**ALONE, **LEAN}),
}


def measure(name: str, tiny: bool, dump: str) -> dict[str, Any]:
    """Plans one row in a separate process."""
    what, overrides = ROWS[name]
    count = int(what["topology"].partition(":")[2])
    environment = {}
    if dump:
        flags = f"--xla_dump_to={pathlib.Path(dump) / name} --xla_dump_hlo_module_re=jit_train_step"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    config = f"{CONFIGS[what['model']]}_dmpo.py"
    return run_plan(name, plan_line(what, overrides, config, count, tiny), tiny, environment)


def table(results: list[dict[str, Any]]) -> str:
    """Formats results as Markdown, one per row."""
    head = ("row", "pairs/card", "arguments GB", "temporaries GB", "of GB", "TFLOP executed")
    head += ("memory traffic GB", "s by products", "s by traffic", "bound by", "minutes", "host GB")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in results:
        cells = [one["row"] + (" (tiny)" if one["tiny"] else "")]
        if "failed" in one:
            cells += [f"failed with status {one['failed']}", *[""] * (len(head) - 4)]
        else:
            plan = one["plan"]
            memory, time = plan["memory"], plan["time"]
            cells += [f"{plan['pairs_per_chip']:g}"]
            cells += [f"{memory[key] / 1e9:.2f}" for key in ("arguments", "temporaries")]
            cells += [f"{memory['limit'] / 1e9:.0f}"]
            cells += [f"{plan['flops']['chip_executed'] / 1e12:.1f}"]
            cells += [f"{plan['xla']['traffic_with_loops'] / 1e9:.0f}"]
            cells += [f"{time['compute']:.3f}", f"{time['memory']:.3f}", plan["bound_by"]]
        cells += [f"{one['seconds'] / 60:.1f}", f"{one['peak_gb']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; default: those missing")
    parser.add_argument("--table", action="store_true", help="plan nothing, print what was")
    parser.add_argument("--tiny", action="store_true", help="debug-size models")
    parser.add_argument("--dump", default="", help="a folder for XLA's texts")
    given = parser.parse_args()
    if unknown := sorted(set(given.rows) - set(ROWS)):
        parser.error(f"there are no rows {unknown}; there are {', '.join(ROWS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {one["row"] for one in results if "failed" not in one}
    for name in () if given.table else given.rows or [row for row in ROWS if row not in done]:
        print(f"{name} ...", flush=True)
        new = measure(name, given.tiny, given.dump)
        kept = [r for r in results if (r["row"], r["tiny"]) != (name, given.tiny)]
        results = [*kept, new]
        if not given.tiny:  # a trial is not a result
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
