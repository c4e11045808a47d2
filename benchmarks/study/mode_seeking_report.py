"""Tables and the picture of mode_seeking.py."""

import pathlib
from typing import Any

import matplotlib
import numpy as np
from matplotlib import patheffects, pyplot
from matplotlib.axes import Axes

matplotlib.use("Agg")
INSIDE = (0.95, 0.8, 0.6, 0.4, 0.2)  # probability within each contour, outermost first
LIMIT = 5.2


def table(found: dict[str, Any], modes: int) -> str:
    """Formats one setting as Markdown: mean ± standard deviation over seeds."""
    names = ["reverse_kl", "forward_kl", *(f"mode {i + 1}" for i in range(modes)), "elsewhere"]
    heads = ["KL(policy ‖ optimum)", "KL(optimum ‖ policy)", *names[2:]]
    lines = [
        f"**{found['setting']}**",
        "",
        "| | candidates, labels | rate | " + " | ".join(heads) + " |",
        "|---|---|---|" + "---|" * len(heads),
    ]
    for row in found["rows"]:
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        shown = [row["method"], row["candidates"], rate]
        for name in names:
            (mean, spread), percent = row[name], not name.endswith("kl")
            cell = f"{100 * mean:.1f} %" if percent else f"{mean:.3f}"
            if row["method"] != "optimum":
                cell += f" ± {100 * spread:.1f}" if percent else f" ± {spread:.3f}"
            shown.append(cell)
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def levels(density: np.ndarray, area: float) -> np.ndarray:
    """Returns the heights above which a density on a grid holds each of INSIDE, ascending."""
    falling = np.sort(density.ravel())[::-1]
    held = np.cumsum(falling) * area
    return falling[np.minimum(np.searchsorted(held, INSIDE), falling.size - 1)]


def panel(
    axes: Axes,
    axis: np.ndarray,
    density: np.ndarray,
    optimum: np.ndarray,
    modes: np.ndarray,
    colours: str,
) -> None:
    """Draws one density filled, the optimum's outlines on it, and the modes numbered."""
    area = (axis[1] - axis[0]) ** 2
    filled = [*levels(density, area), density.max() * 1.01]
    axes.contourf(axis, axis, density, filled, cmap=colours, vmin=0, vmax=1.3 * filled[-2])
    axes.contour(
        axis, axis, optimum, levels(optimum, area)[[0, 2]], colors="#333333", linewidths=0.6
    )
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    for i, (x, y) in enumerate(modes, start=1):
        # Numbers are placed outside the mode, away from the middle.
        out = 1 + 2.0 / np.hypot(x, y)
        axes.plot(x, y, "+", color="black", markersize=6, path_effects=halo)
        axes.text(
            *(out * x, out * y), str(i), ha="center", va="center", fontsize=9, path_effects=halo
        )
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_color("#bbbbbb")


def save_picture(
    path: pathlib.Path,
    axis: np.ndarray,
    known: list[dict[str, Any]],
    learned: list[list[dict[str, Any]]],
    optimum: np.ndarray,
    modes: np.ndarray,
    title: str,
) -> None:
    """Writes the PNG.

    Args:
        axis: cell centres along an edge of the grid, `[cells]`.
        known: the left column: dicts of title, caption and density, `[cells, cells]`.
        learned: one row for forward KL and one for reverse KL, of such dicts.
        optimum: the density whose outlines are in every panel.
        modes: `[M, 2]`.
        title: of the figure.
    """
    columns = 1 + len(learned[0])
    figure, grid = pyplot.subplots(2, columns, figsize=(2.5 * columns, 6.9))
    figure.subplots_adjust(0.006, 0.07, 0.994, 0.905, wspace=0.05, hspace=0.34)
    for row, colours in enumerate(("Oranges", "Blues")):
        shown = zip(grid[row], [known[row], *learned[row]], strict=True)
        for i, (axes, what) in enumerate(shown):
            panel(axes, axis, what["density"], optimum, modes, colours if i else "Greys")
            axes.set_title(what["title"], fontsize=10)
            axes.set_xlabel(what["caption"], fontsize=8.5)
    figure.suptitle(title, fontsize=12, y=0.985)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
