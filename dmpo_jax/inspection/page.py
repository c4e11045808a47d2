"""The HTML page of `inspect`: one file, no script, no network, light and dark."""

import collections
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dmpo_jax.data.sources import Skipped
from dmpo_jax.data.sources.counts import TIE, PairCounts
from dmpo_jax.pages import templates

HERE = pathlib.Path(__file__).parent
MOST_BARS = 12  # of a histogram; the rest are one bar
MOST_BINS = 11  # distinct preferences listed; more are binned by tenths
MOST_REPEATS = 50  # listed; all are counted


class Thumbnail(NamedTuple):
    """A thumbnail's file, relative to the page, and the size of the full image."""

    file: str
    size: str


class Sample(NamedTuple):
    """A pair to show.

    images: of "0" and "1", and of "source" and "mask" if present.
    """

    id: str
    prompt: str
    preference: float
    images: Mapping[str, Thumbnail]


class Repeat(NamedTuple):
    """A prompt with the same two images, repeated. agree: all repeats prefer the same image."""

    ids: Sequence[str]
    agree: bool
    sample: Sample | None


class Inspection(NamedTuple):
    """Results of an inspection.

    rows: upper bound on the source's rows. read: rows read. parts: (units read, units of the
    source). images: number of distinct ones; images_again: number that recur.
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


class Figure(NamedTuple):
    """An image of a pair on the page. mark: CSS class. said: caption."""

    image: Thumbnail
    mark: str
    said: str
    alt: str


def render(found: Inspection) -> str:
    """Returns the complete page. All text from the data is escaped."""
    environment = templates(HERE)
    environment.filters |= {"share": share, "figures": figures}
    repeats = sorted(found.repeats, key=lambda repeat: repeat.agree)  # contradictions first
    return environment.get_template("page.html.j2").render(
        found=found,
        tiles=tiles(found),
        labels=label_bins(found.counts.preferences),
        resolutions=most_common(found.counts.resolutions),
        repeats=repeats,
        contradicting=sum(not repeat.agree for repeat in repeats),
        most_repeats=MOST_REPEATS,
    )


def tiles(found: Inspection) -> list[tuple[str, int, str]]:
    """Returns (name, number, share of the pairs or rows) for the page's head."""
    counts, repeated = found.counts, sum(len(r.ids) - 1 for r in found.repeats)
    skipped = found.skipped.total()
    return [
        ("pairs", counts.pairs, ""),
        ("distinct prompts", len(counts.prompts), ""),
        ("ties", counts.ties, share(counts.ties, counts.pairs)),
        ("repeated pairs", repeated, share(repeated, counts.pairs)),
        ("skipped", skipped, share(skipped, found.read)),
    ]


_ALT = {"source": "the source", "mask": "the mask", "0": "image 0", "1": "image 1"}


def figures(sample: Sample) -> Iterator[Figure]:
    """Yields a pair's images, those given with it first."""
    said = {"0": _verdict(sample.preference), "1": _verdict(1 - sample.preference)}
    said |= {"source": ("given", "source"), "mask": ("given", "mask")}
    for name, alt in _ALT.items():
        if name in sample.images:
            yield Figure(sample.images[name], *said[name], alt)


def _verdict(preference: float) -> tuple[str, str]:
    """Returns CSS class and caption of an image with this probability of being preferred."""
    if preference == TIE:
        return "tie", "tie"
    name = "chosen" if preference > TIE else "rejected"
    return name, name if preference in (0, 1) else f"{name}, {preference:.0%}"


def label_bins(preferences: Mapping[str, int]) -> list[tuple[str, int]]:
    """Returns counts by preference if there are few, else by tenths, the last closed."""
    if len(preferences) <= MOST_BINS:
        said = {"0.00": "0: image 1", "0.50": "0.5: a tie", "1.00": "1: image 0"}
        return [(said.get(name, name), preferences[name]) for name in sorted(preferences)]
    bins = [0] * 10
    for name, count in preferences.items():
        bins[min(int(round(100 * float(name)) // 10), 9)] += count
    return [(f"{i / 10:.1f} to {(i + 1) / 10:.1f}", count) for i, count in enumerate(bins)]


def most_common(counted: Mapping[str, int]) -> list[tuple[str, int]]:
    """Returns the most frequent names in order, and the rest as one entry."""
    ordered = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    first, rest = ordered[:MOST_BARS], ordered[MOST_BARS:]
    other = [(f"{len(rest):,} others", sum(count for _, count in rest))] if rest else []
    return first + other


def share(part: int, whole: int) -> str:
    """Formats a percentage; '' if `whole` is 0."""
    return f"{part / whole:.1%}" if whole else ""
