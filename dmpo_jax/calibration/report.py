"""The report of a calibration: JSON, and a page of tables in Markdown."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dmpo_jax.calibration import search, suggestion
from dmpo_jax.calibration.search import Reading
from dmpo_jax.calibration.suggestion import Row, Suggestion
from dmpo_jax.objectives.pulls import Pull

NOTE = (
    "Predicted for the end of the run: of |level| the 50 % and 95 % quantile, the share of pairs "
    "that are saturated (p(1-p) below 0.01) and past what the loss asks for. Drift is the growth "
    "of both images' errors over the reference's, as a share of it. Predictions are rough: "
    "docs/calibrate.md has how far they were off."
)


def make_report(
    found: Sequence[Reading],
    rates: Sequence[Row],
    table: Sequence[Row],
    said: Suggestion,
    *,
    leaf: str,
    about: dict[str, Any],
    pull: Pull,
) -> dict[str, Any]:
    """Returns the calibration, JSON-serialisable. about: facts of the run to put beside."""
    return {
        **about,
        "leaf": leaf,
        "target": pull.target,
        "suggested_beta": said.beta,
        "suggested_rate_factor": said.rate,
        "reasons": list(said.reasons),
        "paste": f"--config.{leaf}={said.beta:g}",
        "probes": [_probe(reading, pull) for reading in found],
        "by_beta": [suggestion.to_json(row) for row in table],
        "by_rate": [suggestion.to_json(row) for row in rates],
    }


def _probe(reading: Reading, pull: Pull) -> dict[str, Any]:
    now = search.shares(reading, reading.now, pull)
    found = {"beta": reading.probe.beta, "rate": reading.probe.rate, **now._asdict()}
    found |= {"drift": reading.drift_now, "predicted_most": reading.level}
    found |= {"predicted_drift": reading.drift, "accuracy": _accuracy(reading)}
    return {k: v if v is None else float(f"{v:.4g}") for k, v in found.items()}


def _accuracy(reading: Reading) -> float:
    margins, tied = reading.rows["margin"], reading.rows["preference"] == 0.5
    right = np.where(tied, 0.5, 0.5 + 0.5 * np.sign(margins))
    return float(right.mean())


def page(report: dict[str, Any]) -> str:
    """Returns the report as Markdown."""
    lines = [f"# Calibration of {report['leaf']}", "", f"`{report['paste']}`", ""]
    lines += [f"- {reason}." for reason in report["reasons"]]
    lines += ["", NOTE, "", "Against beta:", ""]
    lines += _table(report["by_beta"], report["suggested_beta"])
    lines += ["", f"Against the learning rate, at beta {report['suggested_beta']:g}:", ""]
    lines += _table(report["by_rate"], None)
    lines += ["", f"Measured at the end of {report['updates']} updates of each probe:", ""]
    lines += _table(report["probes"], None)
    return "\n".join(lines) + "\n"


HEADS = {
    "beta": "beta",
    "rate": "rate x",
    "half": "level, 50 %",
    "most": "level, 95 %",
    "saturation": "saturation",
    "past_optimum": "past",
    "drift": "drift",
    "predicted_most": "95 % at the end",
    "beta_for_rate": "beta that fits",
}


def _table(rows: Sequence[dict[str, Any]], marked: float | None) -> list[str]:
    heads = [key for key in HEADS if any(row.get(key) is not None for row in rows)]
    if marked is not None:
        heads.remove("rate")  # the config's
    lines = ["| " + " | ".join(HEADS[key] for key in heads) + " |", "|" + "---:|" * len(heads)]
    for row in rows:
        cells = [_cell(key, row.get(key)) for key in heads]
        if marked is not None and row["beta"] == marked:
            cells = [f"**{cell}**" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in ("saturation", "past_optimum"):
        return f"{value:.2f}"
    return f"{float(f'{value:.3g}'):g}"  # 2000, not 2e+03
