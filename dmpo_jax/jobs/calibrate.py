"""Calibrates beta: probes the first updates of a config's run, and suggests a beta that fits."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from dmpo_jax import storage
from dmpo_jax.calibration import report, search, suggestion
from dmpo_jax.calibration.probe import Prober, summed_rate
from dmpo_jax.config import checks, step_settings
from dmpo_jax.config.configs import Config
from dmpo_jax.errors import UserError
from dmpo_jax.parallel import processes

LOG = logging.getLogger(__name__)
FILE = "calibration.json"


def calibrate(
    config: Config,
    workdir: epath.Path,
    prepare: Callable[[Config, epath.Path], Any],
    *,
    updates: int = 30,
    rates: Sequence[str] = ("0.33", "1", "3"),
) -> dict[str, Any]:
    """Probes the config's run and writes `workdir/calibration.json` and `calibration.md`.

    Writes nothing else, and saves no state: training in the same folder is as without.

    Args:
        prepare: `jobs.train.prepare`. updates: of each probe. rates: factors on the config's rate
            that are probed at the suggested beta.

    Returns:
        `report.make_report`.

    Raises:
        ValueError: the objective or the rate cannot be calibrated; model, data and mesh do not
            fit. Raised before compiling, but for a policy that does not move.
    """
    began = time.monotonic()
    pull, factors = find(config), parse_rates(rates)
    config = config.copy_and_resolve_references()
    config.log.sample_every = 0  # draws nothing, so needs no text encoders
    run, params = prepare(config, workdir)
    settings, leaf = run.step.settings, f"objectives.{config.objective}.beta"
    updates, first = min(updates, config.train.steps), float(settings.hyperparameters["beta"])
    total = summed_rate(run.step, config.train.steps)
    probe = Prober(run.step, params, run.batches, run.key, updates)

    def reported(beta: float, rate: float) -> Any:
        LOG.info("probing beta %g at %g times the rate, %d updates ...", beta, rate, updates)
        return probe(beta, rate)

    found = search.search(reported, first, pull, total)
    beta, own = search.nice(search.solve(found, pull)), search.nearest(found, pull)
    others = search.read_rates(reported, beta, factors, pull, total)
    by_rate = suggestion.by_rate([own, *others], beta, pull)
    said = suggestion.suggest(found, by_rate, first, pull, leaf)
    about = {
        "objective": config.objective,
        "config_beta": first,
        "learning_rate": config.optimizer.learning_rate,
        "batch_size": settings.batch_size,
        "updates": updates,
        "steps": config.train.steps,
        "summed_rate_of_run": float(f"{total:.4g}"),
        "seconds": round(time.monotonic() - began, 1),
    }
    table = suggestion.by_beta(found, first, beta, pull)
    made = report.make_report(
        [*found, *others], by_rate, table, said, leaf=leaf, about=about, pull=pull
    )
    if jax.process_index() == 0:
        storage.write_json(workdir / FILE, made)
        storage.write_bytes((workdir / FILE).with_suffix(".md"), report.page(made).encode())
    processes.barrier("the calibration is written")
    return made


def check(config: Config, workdir: epath.Path) -> None:
    """Raises ValueError for what can be known before the jobs ahead of this one have run."""
    find(config)
    step_settings.make_mesh(config)
    if "encode" not in config.jobs:
        step_settings.check_data(config, workdir)
    step_settings.check_beginning(config)


def find(config: Config) -> Any:
    """Returns the `Pull` of a config's objective; UserError if it cannot be calibrated."""
    settings = step_settings.read_step(config)
    found = settings.objective.find_pull(**settings.hyperparameters)
    checks.check_calibration(config)
    return found


def parse_rates(rates: Sequence[str]) -> list[float]:
    """Returns factors on the learning rate; UserError if one is not a number above 0."""
    try:
        found = [float(rate) for rate in rates]
    except ValueError:
        found = [0.0]
    if not all(0 < rate < float("inf") for rate in found):
        raise UserError(
            f"--rates must be factors on the learning rate, above 0, but got {','.join(rates)!r}: "
            "for example --rates=0.33,1,3"
        )
    return found
