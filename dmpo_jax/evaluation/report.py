"""The page of an evaluation: tables, plots, and the images side by side, without a network."""

import base64
import io
import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from dmpo_jax import storage
from dmpo_jax.evaluation import plots
from dmpo_jax.extras import install_hint
from dmpo_jax.pages import templates
from dmpo_jax.training.run_page import PAGE

THUMBNAIL = 384  # pixels of the longer side
AT_ONCE = 400  # cards on the page before its reader asks for more
EXTREMES = 100  # best and worst each, of a single file
THREADS = 8

Record = Mapping[str, Any]


def write_report(
    out: epath.Path,
    result: Record,
    rows: Sequence[Record],
    open_image: Callable[[str], np.ndarray],
    *,
    single_file: bool = False,
) -> epath.Path:
    """Writes out/report/index.html, with small copies of the images in out/report/images.

    Args:
        out: what the images' paths are relative to.
        result: `baseline`, `models`, `scorers`, `comparisons` (of each other model `overall` and
            by `categories`, entries of `statistics.compare` by scorer), `estimand`, `prompts`,
            `images_per_prompt`, and what there is of `agreement`, `diversity` and `protocol`.
        rows: for each prompt and seed `number`, `prompt`, `category`, `seed`, the path of each
            model's image (`images`), and its scores (`scores`, by scorer and model).
        open_image: a path of `rows` -> uint8 `[H, W, 3]`; called by several threads at once.
        single_file: writes the page alone, with the images that the first model won and lost most
            clearly by the primary scorer inside it.

    Returns:
        The page's path.
    """
    out, folder = epath.Path(out), epath.Path(out) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    models = [result["baseline"], *result["comparisons"]]
    primary = _primary(result["scorers"])
    shown = _extremes(rows, primary, models) if single_file else list(rows)
    thumbs = _write_thumbnails(folder, shown, models, open_image, single_file)
    named = zip(shown, thumbs, strict=True)
    scorers = list(result["scorers"])
    data = {
        "models": models,
        "baseline": models[0],
        "primary": primary,
        "linked": not single_file,
        "at_once": AT_ONCE,
        "salt": zlib.crc32(json.dumps([models, [row["images"] for row in rows]]).encode()),
        "rows": [_row(row, own, models, scorers) for row, own in named],
    }
    trained = not single_file and (out / PAGE).exists()
    page = _render(result, data, total=len(rows), single_file=single_file, trained=trained)
    storage.write_bytes(folder / "index.html", page.encode())
    return folder / "index.html"


def _primary(scorers: Record) -> str:
    return next(
        (name for name, about in scorers.items() if about.get("primary")), next(iter(scorers))
    )


def _extremes(rows: Sequence[Record], primary: str, models: Sequence[str]) -> list[Record]:
    """The rows of the largest wins and the worst losses of the first model."""

    def gain(row: Record) -> float:
        scores = row["scores"][primary]
        return scores[models[1]] - scores[models[0]]

    ordered = sorted(rows, key=gain)
    if len(ordered) <= 2 * EXTREMES:
        return ordered
    return ordered[:EXTREMES] + ordered[-EXTREMES:]


def _write_thumbnails(
    folder: epath.Path,
    rows: Sequence[Record],
    models: Sequence[str],
    open_image: Callable[[str], np.ndarray],
    inside: bool,
) -> list[list[str]]:
    """Returns an address of a small copy for each row and model, relative to the page."""
    if not inside:
        (folder / "images").mkdir(exist_ok=True)

    def make(job: tuple[Record, int]) -> str:
        row, place = job
        content = _webp(open_image(row["images"][models[place]]))
        if inside:
            return "data:image/webp;base64," + base64.b64encode(content).decode()
        file = f"images/{row['number']:05}-{place}.webp"  # a model's name may hold any character
        storage.write_bytes(folder / file, content)
        return file

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(make, itertools.product(rows, range(len(models)))))
    return [found[i : i + len(models)] for i in range(0, len(found), len(models))]


def _webp(image: np.ndarray) -> bytes:
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def _row(
    row: Record, thumbs: list[str], models: Sequence[str], scorers: Sequence[str]
) -> dict[str, Any]:
    """Returns a row as the page's script reads it; lists are in the order of the models."""
    return {
        **{name: row[name] for name in ("number", "prompt", "category", "seed")},
        "images": [row["images"][model] for model in models],
        "thumbs": thumbs,
        "scores": {s: [row["scores"][s].get(m) for m in models] for s in scorers},
    }


def _render(result: Record, data: Record, *, total: int, single_file: bool, trained: bool) -> str:
    scorers, compared = result["scorers"], result["comparisons"]
    marks = {name: _marks(about) for name, about in scorers.items()}
    by_category = {
        model: {
            scorer: {name: entries[scorer] for name, entries in found["categories"].items()}
            for scorer in scorers
        }
        for model, found in compared.items()
    }
    environment = templates(pathlib.Path(__file__).parent)
    environment.filters["plain"] = _plain
    return environment.get_template("report.html.j2").render(
        result=result,
        data=data,
        baseline=data["baseline"],
        others=data["models"][1:],
        primary=data["primary"],
        dependent=[n for n, about in scorers.items() if not about.get("independent", True)],
        overall={
            model: [(name, found["overall"][name], marks[name]) for name in scorers]
            for model, found in compared.items()
        },
        by_category={
            model: {s: [(n, e, ()) for n, e in found.items()] for s, found in scored.items()}
            for model, scored in by_category.items()
        },
        plots={model: _plots(compared[model]["overall"], by_category[model]) for model in compared},
        categories=sorted({row["category"] for row in data["rows"] if row["category"]}),
        scorers=[_scorer(name, about) for name, about in scorers.items()],
        folders=[{"model": name, **about} for name, about in result["models"].items()],
        diversity=[{"model": name, **found} for name, found in result.get("diversity", {}).items()],
        protocol=json.dumps(result.get("protocol"), indent=2, ensure_ascii=False),
        install=install_hint("report"),
        total=total,
        shown=len(data["rows"]),
        single_file=single_file,
        trained=epath.Path(PAGE).name if trained else "",
    )


def _plots(overall: Record, by_category: Record) -> list[str]:
    """Of one model: all scorers, then each scorer's categories; none without matplotlib."""
    drawn = [plots.win_rates(plots.rows_of(overall), "all prompts")]
    drawn += [
        plots.win_rates(plots.rows_of({"all prompts": overall[scorer], **entries}), scorer)
        for scorer, entries in by_category.items()
        if entries
    ]
    return [plot for plot in drawn if plot]


def _marks(about: Record) -> list[tuple[str, str]]:
    """(CSS class, text) of what is to be known beside a scorer's name."""
    said = [("", "primary")] if about.get("primary") else []
    if not about.get("independent", True):
        said.append(("bad", "no independent judge"))
    if not about.get("uses_prompt", True):
        said.append(("", "sees no prompt"))
    return said


def _scorer(name: str, about: Record) -> dict[str, Any]:
    return {
        "scorer": name,
        "version": about.get("version"),
        "temperature": about.get("temperature"),
        "reads the prompt": about.get("uses_prompt", True),
        "labelled training pairs": not about.get("independent", True),
    }


def _plain(value: Any) -> str:
    """A JSON value as a cell's text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
