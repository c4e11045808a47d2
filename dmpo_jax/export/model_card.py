"""README.md beside exported weights: what they are, from what, how they were made."""

import importlib.metadata
import json
from typing import Any

import jax
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config import leaves as configs

USE = """```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({load})
{lora}```"""


def write_card(
    config: configs.Config, workdir: epath.Path, out: epath.Path, *, step: int, ema: bool
) -> None:
    """Writes `out/README.md`: front matter as model hubs read it, then tables for people."""
    if jax.process_index() != 0:
        return
    (out / "README.md").write_text(
        "\n\n".join(
            [
                front_matter(config, out),
                f"# {config.model.folder.rstrip('/').rpartition('/')[2]}, aligned with "
                f"{config.objective}",
                summary(config, step=step, ema=ema),
                how_to_use(config, out),
                "## Data\n\n" + table(about_data(config, workdir)),
                "## Settings\n\n" + table(settings(config)),
                "## Metrics\n\n" + table(metrics(workdir, step)),
            ]
        )
        + "\n"
    )


def front_matter(config: configs.Config, out: epath.Path) -> str:
    tags = ["diffusion", "preference-alignment", config.objective.replace("_", "-"), "dmpo_jax"]
    tags += ["lora"] if config.lora.rank else []
    adapter = not (out / "model_index.json").exists()
    base = json.dumps(config.model.folder)  # quoted: a YAML string may hold anything then
    _, family = diffusers_io.load_family(config.model.folder)
    task = "image-to-image" if family.given else "text-to-image"
    lines = [
        "---",
        f"base_model: {base}",
        f"base_model_relation: {'adapter' if adapter else 'finetune'}",
        "library_name: diffusers",
        f"pipeline_tag: {task}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    return "\n".join(lines)


def summary(config: configs.Config, *, step: int, ema: bool) -> str:
    what = f"LoRA adapters of rank {config.lora.rank}" if config.lora.rank else "the whole UNet"
    kept = f", the moving average of decay {config.train.ema_decay}" if ema else ""
    return (
        f"`{config.model.folder}` after {step} updates of `{config.objective}` on "
        f"{step * config.train.batch_size:,} preference pairs ({what} trained{kept}). "
        f"Made by dmpo_jax {importlib.metadata.version('dmpo_jax')}."
    )


def how_to_use(config: configs.Config, out: epath.Path) -> str:
    if (out / "model_index.json").exists():
        return "## Use\n\n" + USE.format(load='"THIS_FOLDER"', lora="")
    lora = 'pipeline.load_lora_weights("THIS_FOLDER")\n'
    return "## Use\n\n" + USE.format(load=repr(config.model.folder), lora=lora)


def about_data(config: configs.Config, workdir: epath.Path) -> dict[str, Any]:
    if config.data.mix:
        return {"pairs (folder=weight)": ", ".join(config.data.mix)}
    marker = epath.Path(config.data.encoded or workdir / "encoded") / "encoded.json"
    if not marker.exists():
        return {"pairs": str(marker.parent)}
    meta = json.loads(marker.read_text())
    about = {k: meta[k] for k in ("source", "resolution", "vae", "model") if meta.get(k)}
    return {**about, **{f"{name} (count)": n for name, n in meta["counts"].items()}}


def settings(config: configs.Config) -> dict[str, Any]:
    """Every leaf of `configs.identity`, which is what made these weights and no other."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found = {}
        for key, value in tree.items():
            nested = isinstance(value, dict)
            found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
        return found

    return {k: v for k, v in flat(configs.identity(config)).items() if v not in ("", None)}


def metrics(workdir: epath.Path, step: int) -> dict[str, Any]:
    """The last values that were logged up to `step`, and the judges' where there are any."""
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
