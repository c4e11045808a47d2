"""Reads some raw pairs of a source and writes a page about them."""

import collections
import functools
import hashlib
import io
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath
from PIL import Image

from dmpo_jax import storage
from dmpo_jax.data import sources
from dmpo_jax.data.sources.bad_records import decode_pair
from dmpo_jax.data.sources.counts import TIE, PairCounts
from dmpo_jax.errors import UserError
from dmpo_jax.inspection.page import Inspection, Repeat, Sample, Thumbnail, render
from dmpo_jax.progress import Progress

PARTS = 20  # least number read of a source larger than the limit
EXAMPLES = 6  # of ties, of repeated pairs, and of each reason to skip
THUMBNAIL = 384  # pixels of the longer side


class _Seen(NamedTuple):
    """A pair that may recur: its id, and the preference for the image of lower digest."""

    id: str
    preference: float


def inspect_source(
    source: str,
    out: epath.PathLike,
    *,
    ties: str,
    allow_outside: bool = False,
    limit: int = 1000,
    samples: int = 24,
) -> epath.Path:
    """Reads some pairs of `source` (KIND:PATH) and writes `out/index.html` about them.

    The page needs no network and no script. It shows samples side by side, histograms of labels
    and resolutions, ties, duplicates, and skipped records with their reasons. Bad records never
    stop it.

    Args:
        ties, allow_outside: as `sources.open_source`.
        limit: rows to read, spread over a larger source.
        samples: pairs shown.

    Returns:
        The page's path.

    Raises:
        ValueError: the source cannot be opened, limit or samples is below 1, or no row read is
            a pair to train on (raised once the page is written).
    """
    if limit < 1 or samples < 1:
        raise UserError(f"limit and samples must be at least 1, but got {limit} and {samples}")
    opened = sources.open_source(source, ties=ties, allow_outside=allow_outside)
    out = epath.Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    expected = min(limit, len(opened))
    look = _Look(out, stride=max(1, expected // samples), samples=samples)
    units = _spread(opened, limit)
    with Progress(expected, description="inspecting") as progress:
        for item in _rows(opened, units, limit):
            look.at(item)
            progress.advance(1)
    page = render(
        Inspection(
            source=source,
            rows=len(opened),
            read=look.rows,
            parts=(len(units), len(opened.units())),
            counts=look.counts,
            skipped=look.skipped,
            skipped_examples=look.skipped_examples,
            samples=look.samples,
            ties=look.ties,
            images=len(look.uses),
            images_again=sum(uses > 1 for uses in look.uses.values()),
            repeats=look.repeats(),
        )
    )
    storage.write_bytes(out / "index.html", page.encode())
    if not look.counts.pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in look.skipped.most_common())
        raise UserError(
            f"none of the {look.rows} rows of {source} that were read is a pair to train on "
            f"({reasons or 'there is no row'}); see {out / 'index.html'}"
        )
    return out / "index.html"


class _Look:
    """Collects statistics of the rows read, and writes thumbnails as rows arrive."""

    def __init__(self, out: epath.Path, *, stride: int, samples: int):
        self._out, self._stride, self._wanted = out, stride, samples
        self._drawn = 0
        self._pairs: dict[tuple[str, ...], list[_Seen]] = {}
        self._repeated: dict[tuple[str, ...], Sample] = {}
        self.rows = 0
        self.counts = PairCounts()
        self.skipped: collections.Counter[str] = collections.Counter()
        self.skipped_examples: dict[str, list[sources.Skipped]] = {}
        self.samples: list[Sample] = []
        self.ties: list[Sample] = []
        self.uses: collections.Counter[str] = collections.Counter()

    def at(self, item: sources.RawPair | sources.Skipped) -> None:
        """Adds a row to the statistics."""
        self.rows += 1
        if isinstance(item, sources.Skipped):
            self._skip(item)
            return
        decoded = decode_pair(item, frozenset())
        if isinstance(decoded, sources.Skipped):
            self._skip(decoded)
            return
        height_width = [image.shape[:2] for image in decoded.images]
        if self.counts.pairs % self._stride == 0 and len(self.samples) < self._wanted:
            self.samples.append(self._draw(item))
        elif item.preference == TIE and len(self.ties) < EXAMPLES:
            self.ties.append(self._draw(item))
        self.counts.add(item.prompt, item.preference, height_width)
        self._remember(item)

    def repeats(self) -> list[Repeat]:
        """Returns pairs that occur repeatedly: same prompt, same two images in either order."""
        return [
            Repeat(
                [seen.id for seen in pairs],
                agree=len({(p.preference > TIE) - (p.preference < TIE) for p in pairs}) == 1,
                sample=self._repeated.get(key),
            )
            for key, pairs in self._pairs.items()
            if len(pairs) > 1
        ]

    def _skip(self, skipped: sources.Skipped) -> None:
        self.skipped[skipped.reason] += 1
        examples = self.skipped_examples.setdefault(skipped.reason, [])
        if len(examples) < EXAMPLES:
            examples.append(skipped)

    def _remember(self, pair: sources.RawPair) -> None:
        digests = [hashlib.blake2b(x, digest_size=16).hexdigest() for x in pair.images]
        self.uses.update(digests)
        key = (pair.prompt, *sorted(digests))
        first = pair.preference if digests[0] == key[1] else 1 - pair.preference
        seen = self._pairs.setdefault(key, [])
        seen.append(_Seen(pair.id, first))
        if len(seen) == 2 and len(self._repeated) < EXAMPLES:
            self._repeated[key] = self._draw(pair)

    def _draw(self, pair: sources.RawPair) -> Sample:
        """Writes thumbnails of all images of a pair."""
        self._drawn += 1
        drawn = {}
        encoded = {"0": pair.images[0], "1": pair.images[1], "source": pair.source}
        for name, data in (encoded | {"mask": pair.mask}).items():
            if data is None:
                continue
            made = sources.guard(pair.id, functools.partial(_make_thumbnail, data), timed=True)
            if isinstance(made, sources.Skipped):  # a source or mask, which decode_pair left out
                continue
            # Numbers, not ids: an id may hold any character.
            file = f"images/{self._drawn:04}-{name}.jpg"
            (self._out / file).write_bytes(made[0])
            drawn[name] = Thumbnail(file, made[1])
        return Sample(pair.id, pair.prompt, pair.preference, drawn)


def _make_thumbnail(data: bytes) -> tuple[bytes, str]:
    """Returns a JPEG of an encoded image, and the size of the image."""
    image = Image.fromarray(sources.decode_image(data))
    size = f"{image.width}x{image.height}"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), size


def _spread(source: sources.Source, limit: int) -> list[sources.Unit]:
    """Returns all units of a source within the limit, or evenly spread units of a larger one."""
    units = source.units()
    if len(source) <= limit or not units:
        return units
    enough = -(-limit * len(units) // len(source))
    count = min(len(units), max(PARTS, enough))
    return [units[i * len(units) // count] for i in range(count)]


def _rows(
    source: sources.Source, units: list[sources.Unit], limit: int
) -> Iterator[sources.RawPair | sources.Skipped]:
    """Yields up to `limit` rows, about equally many of each unit."""
    each = limit if len(source) <= limit else -(-limit // len(units))
    rows = itertools.chain.from_iterable(
        itertools.islice(source.read(unit), each) for unit in units
    )
    return itertools.islice(rows, limit)
