"""The page that `inspect` writes: one HTML file, no script, no network, light and dark."""

import collections
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dmpo_jax.data.raw import Skipped
from dmpo_jax.data.raw.counts import TIE, PairCounts

MOST_BARS = 12  # of a histogram; the rest are one bar
MOST_BINS = 11  # distinct preferences before they are binned by tenths
MOST_REPEATS = 50  # listed; all are counted


class Thumbnail(NamedTuple):
    """A small picture's file, relative to the page, and the size of the image itself."""

    file: str
    size: str


class Sample(NamedTuple):
    """A pair to show; images: of "0", "1", and where there are any "source" and "mask"."""

    id: str
    prompt: str
    preference: float
    images: Mapping[str, Thumbnail]


class Repeat(NamedTuple):
    """A prompt with the same two images, more than once; agree: they prefer the same one."""

    ids: Sequence[str]
    agree: bool
    sample: Sample | None


class Inspection(NamedTuple):
    """What was found.

    rows: of the source, at most. read: rows looked at. parts: (looked into, of the source).
    images: distinct ones; images_again: those of them that are in several pairs.
    """

    source: str
    rows: int
    read: int
    parts: tuple[int, int]
    counts: PairCounts
    skipped: collections.Counter[str]
    skipped_examples: Mapping[str, Sequence[Skipped]]
    samples: Sequence[Sample]
    ties: Sequence[Sample]
    images: int
    images_again: int
    repeats: Sequence[Repeat]


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1b1f24;
  --soft: #57606a; --line: #d5dae0; --bar: #4c78a8; --good: #0a7a34; --bad: #a6331b }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --card: #1e2328; --ink: #e8eaed; --soft: #a3adb8; --line: #363d45;
    --bar: #7aa6d8; --good: #56c97d; --bad: #f08a70 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; background: var(--paper); color: var(--ink);
  max-width: 80rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 1rem 0 .25rem }
h3 .soft { font-weight: normal }
p { margin: .25rem 0 .75rem; max-width: 46rem }
.soft, figcaption { color: var(--soft) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr));
  gap: .75rem; margin: 1.25rem 0; padding: 0 }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .8rem }
.tiles dt { color: var(--soft); font-size: .85rem }
.tiles dd { margin: 0; font-size: 1.4rem; font-variant-numeric: tabular-nums }
.tiles small { font-size: .85rem; color: var(--soft) }
.pairs { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
.pair { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem; display: flex; flex-direction: column; gap: .5rem; min-width: 0 }
.prompt { margin: 0; max-height: 7.5em; overflow: auto; white-space: pre-wrap }
.id { margin: 0; font-size: .8rem; color: var(--soft) }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; margin-top: auto }
figure { margin: 0; min-width: 0 }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: var(--paper); border: 3px solid var(--line); border-radius: 6px }
.given:first-child:nth-last-child(3) { grid-column: 1 / -1; width: calc(50% - .25rem) }
figure.chosen img { border-color: var(--good) }
figcaption { font-size: .85rem; display: flex; justify-content: space-between;
  flex-wrap: wrap; gap: 0 .5rem }
.chosen b { color: var(--good) }
svg { display: block; max-width: 46rem; margin: .5rem 0 }
svg text { fill: var(--ink); font: 14px system-ui, sans-serif }
svg rect { fill: var(--bar) }
summary { cursor: pointer }
.bad { color: var(--bad) }
ul { padding-left: 1.2rem; margin: .25rem 0 1rem }
"""


def render(found: Inspection) -> str:
    """The whole page. Whatever comes from the data is escaped."""
    source = html.escape(found.source)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pairs of {source}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{source}</h1>
<p class="soft">{_extent(found)}</p>
{_tiles(found)}
<h2>Labels</h2>
<p>How often a pair says that image 0 is preferred with this probability.</p>
{_bars(_label_bins(found.counts.preferences))}
<h2>Resolutions</h2>
<p>Images by width and height in pixels.</p>
{_bars(_most(found.counts.resolutions))}
<h2>Left out</h2>
{_left_out(found)}
<h2>Sample pairs</h2>
{_cards(found.samples)}
<h2>Ties</h2>
{_ties(found)}
<h2>Duplicates</h2>
{_duplicates(found)}
</body>
</html>
"""


def _extent(found: Inspection) -> str:
    if found.read >= found.rows:
        return f"All {_number(found.read, 'row')} were read."
    looked, parts = found.parts
    return (
        f"{_number(found.read, 'row')} of at most {found.rows:,} were read, from {looked:,} of "
        f"the source's {_number(parts, 'part')}. Numbers are of these rows."
    )


def _tiles(found: Inspection) -> str:
    counts, repeated = found.counts, sum(len(r.ids) - 1 for r in found.repeats)
    left_out = found.skipped.total()
    tiles = [
        ("pairs", counts.pairs, ""),
        ("distinct prompts", len(counts.prompts), ""),
        ("ties", counts.ties, _share(counts.ties, counts.pairs)),
        ("repeated pairs", repeated, _share(repeated, counts.pairs)),
        ("left out", left_out, _share(left_out, found.read)),
    ]
    return (
        '<dl class="tiles">'
        + "".join(
            f"<div><dt>{name}</dt><dd>{value:,} <small>{share}</small></dd></div>"
            for name, value, share in tiles
        )
        + "</dl>"
    )


def _cards(samples: Iterable[Sample]) -> str:
    cards = "\n".join(map(_card, samples))
    return f'<div class="pairs">\n{cards}\n</div>' if cards else "<p>None.</p>"


def _card(sample: Sample) -> str:
    said = {"0": _verdict(sample.preference), "1": _verdict(1 - sample.preference)}
    said |= {"source": ("given", "source"), "mask": ("given", "mask")}
    figures = "".join(
        f'<figure class="{said[name][0]}"><img src="{html.escape(image.file)}" loading="lazy" '
        f'alt="{_ALT[name]}"><figcaption><b>{said[name][1]}</b> <span>{image.size}</span>'
        "</figcaption></figure>"
        for name, image in sorted(sample.images.items(), key=lambda item: list(_ALT).index(item[0]))
    )
    prompt = html.escape(sample.prompt) or '<span class="soft">(empty prompt)</span>'
    return (
        f'<article class="pair"><p class="prompt">{prompt}</p>'
        f'<p class="id">{html.escape(sample.id)}</p><div class="two">{figures}</div></article>'
    )


_ALT = {"source": "the source", "mask": "the mask", "0": "image 0", "1": "image 1"}


def _verdict(preference: float) -> tuple[str, str]:
    """CSS class and words for the image that has this probability of being preferred."""
    if preference == TIE:
        return "tie", "tie"
    name = "chosen" if preference > TIE else "rejected"
    return name, name if preference in (0, 1) else f"{name}, {preference:.0%}"


def _ties(found: Inspection) -> str:
    counts = found.counts
    if not counts.ties:
        return "<p>None.</p>"
    said = (
        f"{counts.ties:,} of {_number(counts.pairs, 'pair')} ({_share(counts.ties, counts.pairs)})"
    )
    return f"<p>{said} prefer neither image.</p>" + (_cards(found.ties) if found.ties else "")


def _duplicates(found: Inspection) -> str:
    wrong = [repeat for repeat in found.repeats if not repeat.agree]
    lines = [
        f"<p>{found.images_again:,} of {_number(found.images, 'distinct image')} (by their bytes) "
        f"{'is' if found.images_again == 1 else 'are'} in several pairs.</p>"
    ]
    if not found.repeats:
        return "".join([*lines, "<p>No prompt has the same two images twice.</p>"])
    lines.append(
        f"<p>{_number(len(found.repeats), 'prompt with two images', 'prompts with two images')} "
        f"came more than once; <span class={'bad' if wrong else 'soft'}>{len(wrong):,} of them "
        "with different preferences</span>.</p>"
    )
    # Those that contradict themselves come first.
    ordered = [*wrong, *(repeat for repeat in found.repeats if repeat.agree)]
    items = "".join(
        f"<li>{' = '.join(map(html.escape, repeat.ids[:8]))}"
        f"{'' if len(repeat.ids) <= 8 else f' and {len(repeat.ids) - 8:,} more'}"
        f"{'' if repeat.agree else ' <b class=bad>different preferences</b>'}</li>"
        for repeat in ordered[:MOST_REPEATS]
    )
    lines.append(f"<details><summary>Which</summary><ul>{items}</ul></details>")
    lines.append(_cards(repeat.sample for repeat in ordered if repeat.sample))
    return "\n".join(lines)


def _left_out(found: Inspection) -> str:
    if not found.skipped:
        return "<p>Nothing.</p>"
    parts = []
    for reason, count in found.skipped.most_common():
        first = found.skipped_examples.get(reason, ())
        items = "".join(
            f"<li>{html.escape(x.id)}{': ' if x.detail else ''}{html.escape(x.detail)}</li>"
            for x in first
        )
        more = f"<li>and {count - len(first):,} more</li>" if count > len(first) else ""
        said = f"{_number(count, 'row')}, {_share(count, found.read)}"
        parts.append(
            f'<h3>{html.escape(reason)} <span class="soft">{said}</span></h3><ul>{items}{more}</ul>'
        )
    return "\n".join(parts)


def _label_bins(preferences: Mapping[str, int]) -> list[tuple[str, int]]:
    """Each preference by itself where there are few; else tenths, the last closed."""
    if len(preferences) <= MOST_BINS:
        said = {"0.00": "0: image 1", "0.50": "0.5: a tie", "1.00": "1: image 0"}
        return [(said.get(name, name), preferences[name]) for name in sorted(preferences)]
    bins = [0] * 10
    for name, count in preferences.items():
        bins[min(int(round(100 * float(name)) // 10), 9)] += count
    return [(f"{i / 10:.1f} to {(i + 1) / 10:.1f}", count) for i, count in enumerate(bins)]


def _most(counted: Mapping[str, int]) -> list[tuple[str, int]]:
    ordered = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    first, rest = ordered[:MOST_BARS], ordered[MOST_BARS:]
    other = [(f"{len(rest):,} others", sum(count for _, count in rest))] if rest else []
    return first + other


def _bars(rows: Sequence[tuple[str, int]]) -> str:
    """A histogram: lengths in percent of the page's width, so that text keeps its size."""
    if not rows:
        return "<p>None.</p>"
    total, most, line = sum(c for _, c in rows), max(c for _, c in rows), 26
    drawn = []
    for i, (name, count) in enumerate(rows):
        y = i * line
        drawn.append(
            f'<text x="0" y="{y + 18}">{html.escape(name)}</text>'
            f'<rect x="30%" y="{y + 4}" width="{32 * count / max(most, 1):.2f}%" height="18" '
            f'rx="2"/><text x="100%" y="{y + 18}" text-anchor="end">{count:,} '
            f"({_share(count, total)})</text>"
        )
    said = html.escape("; ".join(f"{name}: {count:,}" for name, count in rows))
    return (
        f'<svg width="100%" height="{line * len(rows)}" role="img" aria-label="{said}">'
        f"{''.join(drawn)}</svg>"
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
