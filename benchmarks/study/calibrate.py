"""Does the beta that `dmpo-jax calibrate` suggests fit the full run?

    python benchmarks/study/calibrate.py           # about half an hour on 2 cores
    python benchmarks/study/calibrate.py --table   # prints the table again, trains nothing

On the digits and on a tiny random SDXL, for each of OBJECTIVES: calibrates, from betas that are far
too low and far too high, and trains a full run with each suggested beta. Writes
OUT/calibrate.json: the suggestions, what they cost, and the end of each full run (means of the last
LAST updates). Existing calibrations and runs in WORK are kept.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
LAST = 20  # updates at the end of a run
OBJECTIVES = ("dmpo", "diffusion_dpo", "jensen_shannon")
# Betas that calibrations start from: as published, and as far off on the other side.
STARTS = {"digits": (2000.0, 3.0), "sdxl": (6000.0,)}
ENDS = ("logit_p05", "logit_p50", "logit_p95", "saturation", "past_optimum", "implicit_accuracy")
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"train.batch_size": 32, "mesh.cpu_devices": 1, "log.validate_every": 0},
    # Of the debug run: more updates, and a rate at which noise can be learnt in them.
    "sdxl": {
        "train.steps": 100,
        "optimizer.learning_rate": 1e-4,
        "optimizer.warmup_steps": 10,
        "log.validate_every": 0,
    },
}
CONFIGS = {"digits": "digits_dmpo", "sdxl": "sdxl_dmpo:debug"}
WITHIN = (1.0, 6.0)  # logit_p95 of a run that fits
SATURATED = 0.1  # of such a run, below


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "calibrate")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--models", default="digits,sdxl", help="of these")
    args = parser.parse_args()
    file = args.out / "calibrate.json"
    if not args.table:
        found = json.loads(file.read_text()) if file.exists() else {}
        for model in args.models.split(","):
            for objective in OBJECTIVES:
                for start in STARTS[model]:
                    key = f"{model}, {objective}, from {start:g}"
                    if key not in found:
                        found[key] = measure(model, objective, start, args.work)
                        file.write_text(json.dumps(found, indent=1) + "\n")
    print(table(json.loads(file.read_text())))


def measure(model: str, objective: str, start: float, work: pathlib.Path) -> dict[str, Any]:
    """Calibrates from a beta, and trains a full run with what is suggested, unless done before."""
    make_data(model, work)
    folder = work / model / f"{objective}_from_{start:g}"
    beta = f"objectives.{objective}.beta"
    if not (folder / "calibration.json").exists():
        first = start == STARTS[model][0]
        rates = "--rates=0.33,1,3" if first else "--rates=1"  # once for each objective
        call(model, "calibrate", work, folder, {"objective": objective, beta: start}, rates)
    said = json.loads((folder / "calibration.json").read_text())
    suggested = said["suggested_beta"]
    run = work / model / f"{objective}_{suggested:g}"
    if not (run / "export").exists():
        extra = {"objective": objective, beta: suggested, "log.every": 1}
        extra |= {"log.sample_every": 0, "log.checkpoint_every": 150}
        call(model, "train", work, run, extra)
    return {
        "suggested_beta": suggested,
        "suggested_rate_factor": said["suggested_rate_factor"],
        "reasons": said["reasons"],
        "probes": said["probes"],
        "updates_of_probe": said["updates"],
        "seconds_calibrating": said["seconds"],
        "end_of_full_run": end_of(run),
    }


def make_data(model: str, work: pathlib.Path) -> None:
    """Makes the digits' pairs once; the debug run makes its own."""
    folder = work / model / "pairs"
    if model == "digits" and not (folder / "encoded" / "encoded.json").exists():
        call(model, "train", work, folder, {"jobs": "('collect','encode')"})


def call(
    model: str,
    command: str,
    work: pathlib.Path,
    folder: pathlib.Path,
    leaves: dict[str, Any],
    *more: str,
) -> None:
    if model == "digits":
        data = {"jobs": "('train',)", "data.encoded": work / model / "pairs" / "encoded"}
        leaves = {**data, **leaves}
    flags = [f"--config.{k}={v}" for k, v in {**SETTINGS[model], **leaves}.items()]
    line = [sys.executable, "-m", "dmpo_jax", command, f"--config={CONFIGS[model]}"]
    subprocess.run([*line, f"--workdir={folder}", *flags, *more], cwd=ROOT, check=True)


def end_of(run: pathlib.Path) -> dict[str, float]:
    """Returns the means of ENDS over the last updates of a run, and its errors' ratio."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if '"learning_rate"' in line][-LAST:]
    means = {name: _mean(rows, name) for name in ENDS if name in rows[-1]}
    error = sum(_mean(rows, f"{image}_error") for image in ("chosen", "rejected"))
    gain = sum(_mean(rows, f"{image}_gain") for image in ("chosen", "rejected"))
    means["error_ratio"] = error / (error - gain)
    return {name: float(f"{value:.4g}") for name, value in means.items()}


def _mean(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def fits(end: dict[str, float]) -> bool:
    """True if a run ended as a suggestion promises."""
    return end["saturation"] < SATURATED and WITHIN[0] <= end["logit_p95"] <= WITHIN[1]


def table(found: dict[str, Any]) -> str:
    """Formats suggestions and the ends of the full runs as Markdown."""
    heads = ["model, objective, start", "suggested", "probes", "updates of probes", "u 95 %"]
    heads += ["saturation", "past optimum", "errors / reference's", "fits"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, one in found.items():
        end, probes = one["end_of_full_run"], len(one["probes"])
        past = end.get("past_optimum")
        cells = [name, f"{one['suggested_beta']:g}", str(probes)]
        cells += [str(probes * one["updates_of_probe"]), f"{end['logit_p95']:.2f}"]
        cells += [f"{end['saturation']:.3f}", "-" if past is None else f"{past:.2f}"]
        cells += [f"{end['error_ratio']:.2f}", "yes" if fits(end) else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
