"""Plans of our step from XLA's GPU compiler: memory, traffic, time by roofline. Needs no GPU.

    python benchmarks/speed/gpu_plan.py                    # the rows that are missing, minutes each
    python benchmarks/speed/gpu_plan.py sd15-full-h100-1   # one row again, or several
    python benchmarks/speed/gpu_plan.py --table            # earlier results, as a table
    python benchmarks/speed/gpu_plan.py --tiny ROW ...     # the same at tiny width, as a trial

Requires the extra [plan-gpu]. Each row runs `launch/plan.py` in a separate process, so that its
time and peak memory are its own. Results go to results/gpu_plan.json after every row, so that a
killed run goes on where it stopped. --dump keeps XLA's texts.
"""

import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from tpu_plan import CONFIGS, ROOT, dumping, plan_line, plan_rows, run_plan

RESULTS = ROOT / "benchmarks" / "results" / "gpu_plan.json"
ALONE = {"mesh.data": 1, "mesh.fsdp": 1}
LEAN = {"model.remat": "transformer"}
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
    config = f"{CONFIGS[what['model']]}_dmpo.py"
    line = plan_line(what, overrides, config, count, tiny)
    return run_plan(name, line, tiny, dumping(dump, name))


def table(results: list[dict[str, Any]]) -> str:
    """Formats results as Markdown, one per row."""
    head = ("row", "pairs/card", "arguments GB", "temporaries GB", "of GB", "TFLOP executed")
    head += ("memory traffic GB", "kernels", "s by products", "s by traffic", "bound by")
    head += ("minutes", "host GB")
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
            cells += [f"{plan['xla'].get('kernels', '?')}"]
            cells += [f"{time['compute']:.3f}", f"{time['memory']:.3f}", plan["bound_by"]]
        cells += [f"{one['seconds'] / 60:.1f}", f"{one['peak_gb']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    plan_rows(__doc__ or "", ROWS, RESULTS, measure, table)
