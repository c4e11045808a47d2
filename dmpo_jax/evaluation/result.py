"""The result of an evaluation: result.json, images.jsonl, the page, and a line a scorer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dmpo_jax import storage
from dmpo_jax.evaluation.comparing import Compared, compare_all, write_rows
from dmpo_jax.evaluation.models import Model
from dmpo_jax.evaluation.picture import before_after, rows_shown, small
from dmpo_jax.evaluation.protocol import ESTIMANDS
from dmpo_jax.evaluation.report import write_report
from dmpo_jax.evaluation.statistics import detectable, prompts_needed
from dmpo_jax.export.record import describe
from dmpo_jax.sampling.images import read_image, save_png

RESULT = "result.json"
COLUMNS = 8  # images per row of the picture


def power(prompts: int, estimand: str) -> str:
    """Describes what so many prompts can show; said before anything is drawn."""
    if estimand == "these":
        return f"{prompts} prompts, taken for all there are: more seeds narrow the intervals"
    needed = ", ".join(f"{rate:.0%} needs {prompts_needed(rate):,}" for rate in (0.52, 0.55, 0.6))
    return (
        f"{prompts} prompts: with 80 % power they show a win rate of {detectable(prompts):.1%} or "
        f"more ({needed})"
    )


def make_result(
    compared: Compared,
    models: Sequence[Model],
    scorers: Mapping[str, Mapping[str, Any]],
    protocol: Mapping[str, Any],
    estimand: str,
) -> dict[str, Any]:
    """Returns the content of result.json.

    scorers: name -> version, temperature, uses_prompt, primary and independent.
    protocol: all that could change a score.
    """
    found = compare_all(compared, estimand=estimand)
    about: dict[str, Any] = {model.name: {"folder": model.folder} for model in models}
    for model in models:
        if model.drawn:
            about[model.name]["export"] = describe(model.folder, model.variant)
    first = models[1].name
    return {
        "judges": found["comparisons"][first]["overall"],
        "export": about[first].get("export"),
        "baseline": models[0].name,
        "models": about,
        "scorers": scorers,
        **found,
        "estimand": estimand,
        "prompts": len(compared.asked.prompts),
        "images_per_prompt": compared.asked.each,
        "protocol": protocol,
    }


def write(out: epath.Path, result: dict[str, Any], compared: Compared, single_file: bool) -> None:
    """Writes the picture, the page, images.jsonl and, last, result.json."""
    base, first = list(compared.files)[:2]
    shown = rows_shown([prompt.text for prompt in compared.asked.every], COLUMNS)
    numbers = [i for row in shown.values() for i in row]
    kept = [
        {i: small(read_image(compared.files[model][i])) for i in numbers} for model in (base, first)
    ]
    save_png(out / "samples" / "before_after.png", before_after(kept[0], kept[1], shown))
    write_rows(compared)

    def open_image(path: str) -> np.ndarray:
        return read_image(path if storage.is_remote(path) else out / path)

    write_report(out, result, compared.rows(), open_image, single_file=single_file)
    storage.write_json(out / RESULT, result)


def summary(result: Mapping[str, Any]) -> str:
    """A line for each model and scorer."""
    lines = [ESTIMANDS[result["estimand"]]]
    for model, found in result["comparisons"].items():
        for name, entry in found["overall"].items():
            low, high = entry["win_rate_ci95"]
            marks = "" if result["scorers"][name]["independent"] else " (labelled the pairs)"
            said = {"policy": "better", "base": "worse"}.get(entry["winner"], "not told apart")
            lines.append(
                f"{model}, {name}{marks}: win rate {entry['win_rate']:.1%} "
                f"[{low:.1%}, {high:.1%}], score {entry['score_base']:.3f} -> "
                f"{entry['score_policy']:.3f}: {said}"
            )
    return "\n".join(lines)
