"""Detects, counts and logs bad records, and tolerates an allowed share of them."""

import collections
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from dmpo_jax.data.sources.images import BadImageError, decode_image, decode_mask
from dmpo_jax.data.sources.rows import RawPair, SkipError, Skipped, guard
from dmpo_jax.errors import UserError

LOG = logging.getLogger(__name__)
HANDFUL = 3  # bad records that never stop a job, however small the set
MAX_LOGGED = 100  # of each reason; all are counted


class TooManyBadError(UserError):
    """More records of a source are bad than the job allows."""


class Decoded(NamedTuple):
    """A raw pair with its images decoded, RGB in [0, 255], each of its own size.

    source, mask: None unless required; the mask is 1 where the source is repainted.
    """

    pair: RawPair
    images: tuple[UInt8[np.ndarray, "_ _ 3"], UInt8[np.ndarray, "_ _ 3"]]
    source: UInt8[np.ndarray, "_ _ 3"] | None = None
    mask: UInt8[np.ndarray, "_ _ 1"] | None = None


def decode_pair(pair: RawPair, needs: frozenset[str] = frozenset()) -> Decoded | Skipped:
    """Decodes a pair, or returns the reason why it is bad.

    A pair is bad if its preference is NaN or outside [0, 1], or if both images have the same
    pixels. It is also bad if an image is missing, truncated, undecodable or absurdly large or thin,
    or takes too long to decode. The same holds for the images in `needs`, a subset of "source" and
    "mask".
    """
    return guard(pair.id, lambda: decode(pair, needs), timed=True)


def decode(pair: RawPair, needs: frozenset[str]) -> Decoded:
    """`decode_pair`, to be called inside `guard`: raises SkipError for a bad pair."""
    if not (math.isfinite(pair.preference) and 0 <= pair.preference <= 1):
        raise SkipError("bad label", f"should lie in [0, 1], but is {pair.preference}")
    for name in sorted(needs):
        if not getattr(pair, name):
            raise SkipError(f"no {name}")
    if not all(pair.images):
        raise SkipError("no image")
    if pair.images[0] == pair.images[1]:
        raise SkipError("identical images", "the same bytes")
    encoded = {"image 0": pair.images[0], "image 1": pair.images[1]}
    encoded |= {name: getattr(pair, name) for name in sorted(needs)}
    decoded = {}
    for name, data in encoded.items():
        try:
            decoded[name] = (decode_mask if name == "mask" else decode_image)(data)
        except BadImageError as error:
            raise SkipError(error.reason, f"{name}: {error}") from error
    images = (decoded["image 0"], decoded["image 1"])
    if np.array_equal(*images):
        raise SkipError("identical images", "the same pixels")
    return Decoded(pair, images, decoded.get("source"), decoded.get("mask"))


class Tally:
    """Counts the pairs of a job, good and bad.

    Args:
        limit: the share of `total` that may be bad.
        total: pairs of the entire source, as by `len`; the same in every part of a job.

    Records skipped by rule (`Skipped.bad` is False) are counted, but not against the limit.
    """

    def __init__(self, limit: float | int = 0.01, total: int = 0):
        if not 0 <= limit <= 1:
            raise UserError(f"limit should be a share from 0 to 1, but is {limit}")
        self.limit, self.total = limit, total
        self.good = self.bad = self.ties = 0
        self.counts: collections.Counter[str] = collections.Counter()  # skipped, by reason

    def ok(self, preference: float | int | None = None) -> None:
        """Counts a used pair; a given preference of 0.5 also counts as a tie."""
        self.good += 1
        self.ties += preference == 0.5

    def skip(self, skipped: Skipped) -> None:
        """Counts and logs a skipped record.

        Raises:
            TooManyBadError: the bad records are more than `limit` of all, and more than HANDFUL.
        """
        self.counts[skipped.reason] += 1
        self.bad += skipped.bad
        detail = f": {skipped.detail}" if skipped.detail else ""
        if self.counts[skipped.reason] <= MAX_LOGGED:
            level = logging.WARNING if skipped.bad else logging.DEBUG
            LOG.log(level, "%s is skipped: %s%s", skipped.id, skipped.reason, detail)
        self.check(f"; the last is {skipped.id}: {skipped.reason}{detail}" if skipped.bad else "")

    def check(self, last: str = "") -> None:
        """Raises TooManyBadError above the limit; needed after `merge`."""
        if self.bad > max(self.limit * self.total, HANDFUL):
            counts = ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common())
            raise TooManyBadError(
                f"{self.bad} of {self.total} pairs are bad, above the limit of "
                f"{self.limit:.2%} ({counts}){last}. Mend the source, or raise the limit"
            )

    def merge(self, other: "Tally") -> "Tally":
        """Adds the counts of another part of the job, in place, without checking the limit."""
        self.good += other.good
        self.bad += other.bad
        self.ties += other.ties
        self.counts.update(other.counts)
        return self

    def to_json(self) -> dict[str, Any]:
        """Returns the input of `from_json`; `counts` is sorted: equal tallies, equal text."""
        counts = dict(sorted(self.counts.items()))
        own = ("limit", "total", "good", "bad", "ties")
        return {name: getattr(self, name) for name in own} | {"counts": counts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Tally":
        tally = cls(value["limit"], value["total"])
        tally.good, tally.bad, tally.ties = value["good"], value["bad"], value["ties"]
        tally.counts.update(value["counts"])
        return tally

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tally) and self.to_json() == other.to_json()

    def __repr__(self) -> str:
        return f"Tally({self.to_json()})"
