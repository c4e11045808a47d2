"""Writes README.md beside exported weights: base model, data, settings, metrics, evaluations."""

import dataclasses
import html
import importlib.metadata
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.data.encoded.meta import DIGEST, MARKER
from dmpo_jax.export import record
from dmpo_jax.export.pipeline import Trained

LOG = logging.getLogger(__name__)
FILE = "README.md"
TAG = "dmpo_jax"  # of every card
RESULT = "result.json"  # of an evaluation
HERE = "THIS_FOLDER"  # stands for the place of the weights, which a card on a hub names
USE = """```python
import diffusers
import torch

pipeline = diffusers.DiffusionPipeline.from_pretrained({load})
{lora}```"""


@dataclasses.dataclass(frozen=True)
class Card:
    """Content of a model card.

    pairs_per_update: of the training batch. ema_decay: of the moving average, 0 if none is
    kept. pairs: the folder of encoded pairs, or FOLDER=WEIGHT of each in a mixture.
    settings: sections of the run's identity. workdir: the run's. forked: fork.json, or None.
    """

    trained: Trained
    objective: str
    pairs_per_update: int
    ema_decay: float | int
    pairs: str | tuple[str, ...]
    settings: Mapping[str, Any]
    workdir: epath.Path
    forked: Mapping[str, Any] | None = None


def write_card(card: Card, out: epath.Path, *, step: int, ema: bool) -> None:
    """Writes `out/README.md`: front matter for model hubs, then tables for readers.

    A card that cannot be written is a warning: the weights beside it are whole.
    """
    if jax.process_index() != 0:
        return
    try:
        storage.write_bytes(out / FILE, render(card, out, step=step, ema=ema).encode())
    except Exception as error:  # of the disk, or of files that a person has changed
        LOG.warning("no model card in %s: %s: %s", out, type(error).__name__, error)


def render(card: Card, out: epath.Path, *, step: int, ema: bool) -> str:
    """Returns the card. It names hub ids, and of other paths the last part only."""
    name = public(card.trained.folder).rpartition("/")[2]
    parts = [
        front_matter(card, out),
        f"# {name}, aligned with {card.objective}",
        summary(card, step=step, ema=ema),
        how_to_use(card.trained, out),
        "## Base model\n\n" + table(about_base(card.trained)),
        "## Data\n\n" + table(about_data(card.pairs)),
        "## Settings\n\n" + table(flat(card.settings)),
        "## Metrics\n\n" + table(metrics(card.workdir, step)),
        *(evaluation(card.trained, found) for found in evaluations(card.workdir, step, ema)),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(card: Card, out: epath.Path) -> str:
    tags = ["diffusion", "preference-alignment", card.objective.replace("_", "-"), TAG]
    tags += ["lora"] if card.trained.adapters else []
    adapter = not (out / "model_index.json").exists()
    _, family = diffusers_io.load_family(card.trained.folder)
    base = [
        # Quoted, so that any text is a valid YAML string.
        f"base_model: {json.dumps(diffusers_io.hub_id(card.trained.folder))}",
        f"base_model_relation: {'adapter' if adapter else 'finetune'}",
    ]
    lines = [
        "---",
        *(base if diffusers_io.is_hub_id(card.trained.folder) else []),
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
    distinct = sum(meta["counts"].get("train", 0) for meta in encoded_metas(card.pairs))
    among = f"from {distinct:,} distinct" if distinct else "of"
    start, before = card.trained.start, ""
    if start:
        before = f"It started from `{public(start)}`. "
    if card.forked:
        before += f"It went on from step {card.forked['step']} of another run. "
    return (
        f"`{public(card.trained.folder)}` after {step} updates of `{card.objective}` on "
        f"{step * card.pairs_per_update:,} draws {among} preference pairs ({what} trained{kept}). "
        f"{before}Made by dmpo_jax {importlib.metadata.version('dmpo_jax')}."
    )


def how_to_use(trained: Trained, out: epath.Path) -> str:
    """Returns a snippet of Python. trained: with the pipeline that adapters belong to."""
    if (out / "model_index.json").exists():
        return "## Use\n\n" + USE.format(load=f'"{HERE}"', lora="")
    lora, load = f'pipeline.load_lora_weights("{HERE}")\n', repr(public(trained.folder))
    begun = trained.begun()
    if begun.folder is not None:  # which the adapters are on, in place of the pipeline's own
        _, family = diffusers_io.load_family(trained.folder)
        part = f"subfolder={family.component!r}" if begun.in_pipeline else ""
        given = ", ".join(filter(None, [repr(public(trained.start)), part]))
        load += f", {family.component}=diffusers.{family.torch_class}.from_pretrained({given})"
    return "## Use\n\n" + USE.format(load=load, lora=lora)


def about_base(trained: Trained) -> dict[str, Any]:
    """Returns the base model and, if training began with others, those weights.

    A hub id is told by its commit, a folder by the digest of its weights
    (`diffusers_io.digest_model`).
    """
    found = {"model": public(trained.folder)}
    if not diffusers_io.is_hub_id(trained.folder):
        digest = diffusers_io.digest_model(trained.folder, trained.variant)
        found["digest of its weights"] = digest
    if trained.start:
        start = trained.begun()
        found |= {"start": public(trained.start), "digest of the start": start.digest()}
    return found


def encoded_metas(pairs: str | tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns encoded.json of each folder; [] if one is not there."""
    folders = [pairs] if isinstance(pairs, str) else [x.rpartition("=")[0] for x in pairs]
    found = [storage.find_json(epath.Path(folder) / MARKER) for folder in folders]
    return found if all(found) else []


def about_data(pairs: str | tuple[str, ...]) -> dict[str, Any]:
    metas = encoded_metas(pairs)
    if not isinstance(pairs, str):
        digests = [meta[DIGEST] for meta in metas if meta.get(DIGEST)]
        found = {"pairs (folder=weight)": ", ".join(map(public, pairs))}
        return found | ({"digests of the pairs": digests} if digests else {})
    if not metas:
        return {"pairs": pairs}
    (meta,) = metas
    about = {k: meta[k] for k in ("source", "resolution", "vae", "model") if meta.get(k)}
    about |= {"digest of the pairs": meta[DIGEST]} if meta.get(DIGEST) else {}
    return {**about, **{f"{name} (count)": n for name, n in meta["counts"].items()}}


def public(text: str) -> str:
    """Returns a hub id as it is, and of a path, or KIND:PATH, the last part alone."""
    if diffusers_io.is_hub_id(text.partition(":")[0]):  # a data set's split may follow
        return text
    if found := re.match(r"(\w+):(?!//)(.*)", text, re.DOTALL):
        return f"{found[1]}:{public(found[2])}"
    return text.rstrip("/").rpartition("/")[2]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens settings to {dotted path: value}, without unset values."""
    found = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return {path: value for path, value in found.items() if value not in ("", None)}


def metrics(workdir: epath.Path, step: int) -> dict[str, Any]:
    """Returns the last values logged up to `step`."""
    last: dict[str, Any] = {}
    for file in sorted(workdir.glob("metrics*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut off by a full disk
                continue
            if row["step"] <= step:
                last |= row
    keys = ("loss", "implicit_accuracy", "margin", "validation_loss")
    return {k: last[k] for k in (*keys, "validation_implicit_accuracy") if last.get(k) is not None}


def evaluations(workdir: epath.Path, step: int, ema: bool) -> list[tuple[str, dict[str, Any]]]:
    """Returns (name of the model there, result.json) of the evaluations of these weights.

    The run's own, and those that `evaluate --out` has put into folders of its workdir. They are
    of the run's export, whose record must be of this step.
    """
    exported = storage.find_json(workdir / "export" / record.FILE) or {}
    if exported.get("step") != step or exported.get("ema") != ema:
        return []
    files = [workdir / RESULT, *sorted(workdir.glob(f"*/{RESULT}"))]
    results = [found for file in files if (found := storage.find_json(file))]
    return [
        (name, result)
        for result in results
        for name, model in result.get("models", {}).items()
        if name != result["baseline"] and model.get("export") == exported
    ]


def evaluation(trained: Trained, found: tuple[str, dict[str, Any]]) -> str:
    """Returns the section about one evaluation: win rates, and all that could change a score."""
    name, result = found
    over = baseline(trained, result["models"][result["baseline"]])
    rates = {}
    for judge, values in result["comparisons"][name]["overall"].items():
        low, high = values["win_rate_ci95"]
        scorer = result["scorers"][judge]
        labelled = "" if scorer["independent"] else "; it also labelled the training pairs"
        rates[f"win rate over {over} by {judge}"] = (
            f"{values['win_rate']:.3f} (95 % interval {low:.3f} to {high:.3f}); "
            f"scorer's version {scorer['version']}{labelled}"
        )
    protocol = {k: v for k, v in result["protocol"].items() if k != "models"}
    asked = {key: result[key] for key in ("prompts", "images_per_prompt")}
    asked["intervals are for prompts"] = result["estimand"].replace("_", " ")
    words = (
        "By `dmpo-jax evaluate`, with the same prompts and seeds for both models, on this step's "
        "export in float32"
    )
    merged = ", its adapters folded in" if trained.adapters else ""
    about = table({**rates, **asked, **flat(protocol, "protocol.")})
    return f"## Evaluation\n\n{words}{merged}.\n\n{about}"


def baseline(trained: Trained, about: Mapping[str, Any]) -> str:
    """Returns what an evaluation compared with: the base by its weights, else a folder's name."""
    weights = diffusers_io.digest_model(trained.folder, trained.variant)
    same = (about.get("export") or {}).get("weights") == weights
    return "the base" if same else public(str(about["folder"]))


def plain(text: str) -> str:
    """Returns text on one line, without its HTML, links, images and columns of tables."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[|\[\]`]", r"\\\g<0>", text)


def table(rows: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, list | tuple):
            return ", ".join(map(shown, value))
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        if "/" in text:
            text = public(text)
        return plain(text)

    lines = [f"| {plain(name)} | {shown(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
