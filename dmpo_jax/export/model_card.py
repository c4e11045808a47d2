"""Writes README.md beside exported weights: their base model, data, settings and metrics."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.export.pipeline import Trained

USE = """```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({load})
{lora}```"""


@dataclasses.dataclass(frozen=True)
class Card:
    """Content of a model card.

    pairs_per_update: of the training batch. ema_decay: of the moving average, 0 if none is
    kept. pairs: the folder of encoded pairs, or FOLDER=WEIGHT of each in a mixture.
    settings: sections of the run's identity. workdir: the run's.
    """

    trained: Trained
    objective: str
    pairs_per_update: int
    ema_decay: float | int
    pairs: str | tuple[str, ...]
    settings: Mapping[str, Any]
    workdir: epath.Path


def write_card(card: Card, out: epath.Path, *, step: int, ema: bool) -> None:
    """Writes `out/README.md`: front matter for model hubs, then tables for readers."""
    if jax.process_index() != 0:
        return
    base = diffusers_io.hub_id(card.trained.folder)
    name = base.rstrip("/").rpartition("/")[2]
    parts = [
        front_matter(card, out),
        f"# {name}, aligned with {card.objective}",
        summary(card, step=step, ema=ema),
        how_to_use(base, out),
        "## Data\n\n" + table(about_data(card.pairs)),
        "## Settings\n\n" + table(flat(card.settings)),
        "## Metrics\n\n" + table(metrics(card.workdir, step)),
    ]
    (out / "README.md").write_text("\n\n".join(parts) + "\n")


def front_matter(card: Card, out: epath.Path) -> str:
    tags = ["diffusion", "preference-alignment", card.objective.replace("_", "-"), "dmpo_jax"]
    tags += ["lora"] if card.trained.adapters else []
    adapter = not (out / "model_index.json").exists()
    _, family = diffusers_io.load_family(card.trained.folder)
    lines = [
        "---",
        # Quoted, so that any text is a valid YAML string.
        f"base_model: {json.dumps(diffusers_io.hub_id(card.trained.folder))}",
        f"base_model_relation: {'adapter' if adapter else 'finetune'}",
        "library_name: diffusers",
        f"pipeline_tag: {'image-to-image' if family.given else 'text-to-image'}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    return "\n".join(lines)


def summary(card: Card, *, step: int, ema: bool) -> str:
    adapters = card.trained.adapters
    what = f"LoRA adapters of rank {adapters.rank}" if adapters else "every parameter"
    kept = f", the moving average of decay {card.ema_decay}" if ema else ""
    return (
        f"`{card.trained.folder}` after {step} updates of `{card.objective}` on "
        f"{step * card.pairs_per_update:,} preference pairs ({what} trained{kept}). "
        f"Made by dmpo_jax {importlib.metadata.version('dmpo_jax')}."
    )


def how_to_use(folder: str, out: epath.Path) -> str:
    """Returns a snippet of Python. folder: the pipeline that adapters belong to."""
    if (out / "model_index.json").exists():
        return "## Use\n\n" + USE.format(load='"THIS_FOLDER"', lora="")
    lora = 'pipeline.load_lora_weights("THIS_FOLDER")\n'
    return "## Use\n\n" + USE.format(load=repr(folder), lora=lora)


def about_data(pairs: str | tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(pairs, str):
        return {"pairs (folder=weight)": ", ".join(pairs)}
    marker = epath.Path(pairs) / "encoded.json"
    if not marker.exists():
        return {"pairs": pairs}
    meta = json.loads(marker.read_text())
    about = {k: meta[k] for k in ("source", "resolution", "vae", "model") if meta.get(k)}
    return {**about, **{f"{name} (count)": n for name, n in meta["counts"].items()}}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens settings to {dotted path: value}, without unset values."""
    found = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return {path: value for path, value in found.items() if value not in ("", None)}


def metrics(workdir: epath.Path, step: int) -> dict[str, Any]:
    """Returns the last values logged up to `step`, and the judges' results if there are any."""
    last: dict[str, Any] = {}
    for file in sorted(workdir.glob("metrics*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if row["step"] <= step:
                last |= row
    keys = ("loss", "implicit_accuracy", "margin", "validation_loss")
    found = {k: last[k] for k in (*keys, "validation_implicit_accuracy") if last.get(k) is not None}
    result = workdir / "result.json"
    if result.exists():
        for judge, values in json.loads(result.read_text())["judges"].items():
            low, high = values["win_rate_ci95"]
            found[f"win rate over the base by {judge}"] = (
                f"{values['win_rate']:.3f} (95 % interval {low:.3f} to {high:.3f})"
            )
    return found


def table(rows: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|")

    lines = [f"| {name} | {shown(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
