"""Does the beta that `dmpo-jax calibrate` suggests fit the full run?

    python benchmarks/study/calibrate.py           # about 15 minutes of CPU time
    python benchmarks/study/calibrate.py --rule    # the runs that the rule was taken from
    python benchmarks/study/calibrate.py --table   # prints the tables again, trains nothing

On the digits and on a tiny random SDXL, for each of OBJECTIVES: searches a beta as the command
does, beginning far too high and far too low, and makes a full run with each suggested one. Probes
and full run are the same compiled step, on the same pairs. Writes OUT/calibrate.json: suggestions,
their cost, and the end of each full run, over its last LAST updates. What is in that file is kept.
--rule makes a full run of the digits for each of RULE, and predicts its end from its beginning.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
from etils import epath

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dmpo_jax.calibration import search  # noqa: E402
from dmpo_jax.calibration.probe import Probe, Prober, run_rates, summed_rate  # noqa: E402
from dmpo_jax.config import configs, step_settings  # noqa: E402
from dmpo_jax.config.files import load_config  # noqa: E402
from dmpo_jax.jobs import encode, train  # noqa: E402
from dmpo_jax.jobs.run import run as run_jobs  # noqa: E402
from dmpo_jax.objectives.pulls import Pull  # noqa: E402
from dmpo_jax.parallel.compilation import cache_compilations  # noqa: E402

LAST = 20  # updates at the end of a run
OBJECTIVES = ("dmpo", "diffusion_dpo", "jensen_shannon")
# Betas that searches begin at: as published, and as far off on the other side.
STARTS = {"digits": (2000.0, 3.0), "sdxl": (6000.0, 3.0)}
UPDATES = {"digits": 30, "sdxl": 20}  # of a probe
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"train.batch_size": 32, "mesh.cpu_devices": 1},
    # The debug run, with more updates, and a rate at which noise can be learnt in them.
    "sdxl": {
        "train.steps": 60,
        "optimizer.learning_rate": 1e-4,
        "optimizer.warmup_steps": 10,
    },
}
RULE = {"dmpo": (3, 10, 30, 100, 300, 1000, 2000), "diffusion_dpo": (3, 30, 300, 2000)}
CONFIGS = {"digits": "digits_dmpo", "sdxl": "sdxl_dmpo:debug"}
WITHIN = (1.0, 6.0)  # of a run that fits: the 95 % quantile of u
SATURATED = 0.1  # and its saturation, below


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--rule", action="store_true", help="make the runs of RULE")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "calibrate")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--models", default="digits,sdxl", help="of these")
    args = parser.parse_args()
    file = args.out / "calibrate.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for objective in RULE if args.rule else ():
        measure_rule(objective, epath.Path(args.work) / "digits", found, file)
    for which in () if args.table or args.rule else (0, 1):  # so that a part is of everything
        for model in args.models.split(","):
            for objective in OBJECTIVES:
                start = STARTS[model][which]
                measure(model, objective, start, epath.Path(args.work) / model, found, file)
    print(tables(found))


def measure(
    model: str,
    objective: str,
    start: float,
    work: epath.Path,
    found: dict[str, Any],
    file: pathlib.Path,
) -> None:
    """Adds to `found`, and to the file, a search and its full run, if they are not there yet."""
    key = f"{model}, {objective}, from {start:g}"
    if key in found and run_key(model, objective, found[key]) in found:
        return
    run, params = prepare(model, objective, work)
    settings = run.step.settings
    pull = settings.objective.find_pull(**settings.hyperparameters)
    total = summed_rate(run.step, run.config.train.steps)
    prober = Prober(run.step, params, run.batches, run.key, UPDATES[model])

    def keep(key: str, value: dict[str, Any]) -> None:
        found[key] = value
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(key, value, flush=True)

    if key not in found:
        keep(key, search_from(start, prober, pull, total, UPDATES[model]))
    if (full := run_key(model, objective, found[key])) not in found:
        rates = run_rates(run.step, run.config.train.steps)
        keep(full, end_of(prober.run(found[key]["suggested_beta"], rates), pull))


def measure_rule(
    objective: str, work: epath.Path, found: dict[str, Any], file: pathlib.Path
) -> None:
    """Adds the full runs of RULE that are not there yet."""
    missing = {rule_key(objective, beta): float(beta) for beta in RULE[objective]}
    missing = {key: beta for key, beta in missing.items() if key not in found}
    if not missing:
        return
    run, params = prepare("digits", objective, work)
    settings = run.step.settings
    pull = settings.objective.find_pull(**settings.hyperparameters)
    prober = Prober(run.step, params, run.batches, run.key, UPDATES["digits"])
    rates = run_rates(run.step, run.config.train.steps)
    for key, beta in missing.items():
        found[key] = rule_of(prober.run(beta, rates), pull)
        file.write_text(json.dumps(found, indent=1) + "\n")


def rule_key(objective: str, beta: float) -> str:
    return f"rule, digits, {objective}, beta {beta:g}"


def rule_of(full: Probe, pull: Pull) -> dict[str, Any]:
    """Returns the end of a full run, and what its first updates predict."""
    first = UPDATES["digits"]
    began = full._replace(pairs=full.pairs[:first], summed=full.summed[:first])
    reading = search.read(began, pull, float(full.summed[-1]))
    return {
        "at_update": first,
        "abs_u_p95_there": short(reading.now),
        "abs_u_p95_predicted": short(reading.level),
        **end_of(full, pull),
    }


def run_key(model: str, objective: str, one: dict[str, Any]) -> str:
    return f"{model}, {objective}, full run with {one['suggested_beta']:g}"


def prepare(model: str, objective: str, work: epath.Path) -> tuple[train.Run, dict[str, Any]]:
    """Prepares a run as the train job does; makes its pairs first, unless they exist."""
    cache_compilations()
    config: configs.Config = load_config(CONFIGS[model])
    for path, value in {**SETTINGS[model], "log.sample_every": 0}.items():
        configs.set_leaf(config, path, value)
    config.objective = objective
    if model == "digits":
        config.jobs = ("collect", "encode")
        run_jobs(config, work)
    else:
        work.mkdir(parents=True, exist_ok=True)
        config = step_settings.with_debug_files(config, work)
        encode.encode(config, source=config.data.source, out=work / "encoded")
    return train.prepare(config, work)


def search_from(
    start: float, prober: Prober, pull: Pull, total: float, updates: int
) -> dict[str, Any]:
    began, cpu = time.monotonic(), time.process_time()
    readings = search.search(prober, start, pull, total)
    beta = search.nice(search.solve(readings, pull))
    return {
        "suggested_beta": beta,
        "predicted": short(search.level_at(beta, readings, pull)),
        "probes": [
            {"beta": short(x.probe.beta), "at_its_end": short(x.now), "predicted": short(x.level)}
            for x in readings
        ],
        "updates": updates * len(readings),
        "seconds": short(time.monotonic() - began),  # other work ran beside it
        "cpu_seconds": short(time.process_time() - cpu),  # the first compiles the step
    }


def end_of(full: Probe, pull: Pull) -> dict[str, float | None]:
    """Returns statistics of u over the last updates of a run, and its errors' ratio."""
    last = full._replace(pairs=full.pairs[-LAST:])
    rows = last.rows()
    levels = full.beta * pull.per_beta(rows)
    error = (rows["chosen_error"] + rows["rejected_error"]).mean()
    gain = (rows["chosen_gain"] + rows["rejected_gain"]).mean()
    past = None if pull.optimum is None else short(pull.optimum(rows, levels).mean())
    p = 1 / (1 + np.exp(-levels))
    return {
        "u_p05": short(np.percentile(levels, 5)),
        "u_p95": short(np.percentile(levels, 95)),
        "abs_u_p50": short(np.percentile(np.abs(levels), 50)),
        "abs_u_p95": short(np.percentile(np.abs(levels), 95)),
        "saturation": short((p * (1 - p) < 0.01).mean()),
        "past_optimum": past,
        "error_ratio": short(error / (error - gain)),
    }


def short(value: Any) -> float:
    return float(f"{float(value):.4g}")


def fits(end: dict[str, float]) -> bool:
    """True if a run ended as a suggestion promises."""
    return end["saturation"] < SATURATED and WITHIN[0] <= end["u_p95"] <= WITHIN[1]


def tables(found: dict[str, Any]) -> str:
    """Formats searches and the ends of their full runs as Markdown."""
    heads = ["model, objective, start", "probes: beta, |u| 95 % predicted", "suggested"]
    heads += ["predicted", "|u| 95 %", "u 95 %", "saturation", "errors / reference's", "fits"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, one in found.items():
        if "suggested_beta" not in one:
            continue
        model, objective, _ = name.split(", ")
        end = found.get(run_key(model, objective, one))
        probes = "; ".join(f"{x['beta']:g}: {x['predicted']:g}" for x in one["probes"])
        cells = [name, probes, f"{one['suggested_beta']:g}", f"{one['predicted']:g}"]
        if end:
            cells += [f"{end[k]:.3g}" for k in ("abs_u_p95", "u_p95", "saturation", "error_ratio")]
            cells += ["yes" if fits(end) else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    heads = ["objective, beta", "|u| 95 % after 30", "predicted", "at the end", "saturation"]
    heads += ["errors / reference's"]
    lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, one in found.items():
        if name.startswith("rule"):
            keys = ("abs_u_p95_there", "abs_u_p95_predicted", "abs_u_p95")
            cells = [f"{one[k]:.3g}" for k in (*keys, "saturation", "error_ratio")]
            lines.append(f"| {name.removeprefix('rule, digits, ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
