"""Plots of win rates as SVG that takes its colours and its font from the page around it."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

INK, SOFT, LINE, BAR = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"  # stand for the page's colours
COLOURS = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", BAR: "var(--bar)"}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": INK,
    "font.size": 9,
}
WIDTH, ROW, REST = 4.2, 0.24, 0.75  # inches: the plot, a row, and what is above and below


class Row(NamedTuple):
    """A win rate with its 95 % interval, in [0, 1]. strong: drawn full, not hollow."""

    name: str
    rate: float
    interval: Sequence[float]
    strong: bool


def rows_of(entries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Rows of entries of `statistics.compare`; strong where a winner is named."""
    return [
        Row(name, entry["win_rate"], entry["win_rate_ci95"], entry.get("winner") is not None)
        for name, entry in entries.items()
    ]


def win_rates(rows: Sequence[Row], title: str) -> str | None:
    """An SVG of a point with its interval a row, from the top; None without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    # Ids are made of the salt: the same each time, of each plot its own.
    settings: Any = STYLE | {"svg.hashsalt": f"{title} {rows}"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, REST + ROW * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(50, color=SOFT, linewidth=1, linestyle=(0, (3, 3)))
        for y, row in enumerate(rows):
            low, high = row.interval
            axes.plot([100 * low, 100 * high], [y, y], color=BAR, linewidth=2)
            face = BAR if row.strong else "none"
            axes.plot(100 * row.rate, y, "o", color=BAR, markerfacecolor=face, markersize=5)
        axes.set_yticks(range(len(rows)), [_literal(_short(row.name)) for row in rows])
        axes.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5), xlabel="win rate, %")
        axes.set_title(_literal(title), loc="left", fontsize=9)
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), rows, title)


def _for_page(svg: str, rows: Sequence[Row], title: str) -> str:
    """The element alone, in the page's colours and font, with its figures as a label."""
    svg = svg[svg.index("<svg") :]
    for pattern, kept in (
        (r"<metadata>.*?</metadata>|<!--.*?-->", ""),
        (r' xmlns(:\w+)?="[^"]*"', ""),
        (r'<g id="[^"]*"', "<g"),
    ):
        svg = re.sub(pattern, kept, svg, flags=re.DOTALL)
    for colour, name in COLOURS.items():
        svg = svg.replace(colour, name)
    for fonts in ("'DejaVu Sans', ", "DejaVu Sans, "):
        svg = svg.replace(fonts, "system-ui, ")
    said = f"{title}: " + "; ".join(
        f"{row.name} {row.rate:.0%}, {row.interval[0]:.0%} to {row.interval[1]:.0%}" for row in rows
    )
    label = said.translate({ord(c): f"&#{ord(c)};" for c in "&<>\"'"})
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _literal(text: str) -> str:
    """Dollar signs would be mathematics."""
    return text.replace("$", r"\$")
