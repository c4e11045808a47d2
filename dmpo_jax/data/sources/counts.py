"""Statistics of raw pairs, counted one by one; the counts of parts add up."""

import collections
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

TIE = 0.5


class PairCounts:
    """Counts of pairs, ties, distinct prompts, image resolutions and preferences.

    prompts: 64-bit digests, not texts: a million of them fit in memory and in a file.
    resolutions: images by "WIDTHxHEIGHT" in pixels. preferences: pairs by preference for
    image 0, rounded to two decimals.
    """

    def __init__(self) -> None:
        self.pairs = 0
        self.ties = 0
        self.prompts: set[str] = set()
        self.resolutions: collections.Counter[str] = collections.Counter()
        self.preferences: collections.Counter[str] = collections.Counter()

    def add(self, prompt: str, preference: float | int, shapes: Sequence[tuple[int, int]]) -> None:
        """Counts a pair; shapes: (height, width) of each image, in pixels."""
        self.pairs += 1
        self.ties += preference == TIE
        self.prompts.add(hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest())
        self.preferences[f"{preference:.2f}"] += 1
        for height, width in shapes:
            self.resolutions[f"{width}x{height}"] += 1

    def merge(self, other: "PairCounts") -> None:
        """Adds the counts of another instance."""
        self.pairs += other.pairs
        self.ties += other.ties
        self.prompts |= other.prompts
        self.resolutions += other.resolutions
        self.preferences += other.preferences

    def to_json(self) -> dict[str, Any]:
        """Returns all counts, as `from_json` reads them."""
        return {
            "pairs": self.pairs,
            "ties": self.ties,
            "prompts": sorted(self.prompts),
            "resolutions": dict(self.resolutions),
            "preferences": dict(self.preferences),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "PairCounts":
        """Inverse of `to_json`."""
        counts = cls()
        counts.pairs, counts.ties = stored["pairs"], stored["ties"]
        counts.prompts = set(stored["prompts"])
        counts.resolutions.update(stored["resolutions"])
        counts.preferences.update(stored["preferences"])
        return counts

    def summary(self) -> dict[str, Any]:
        """Returns a summary to read: prompts, resolutions by frequency, labels in order."""
        return {
            "pairs": self.pairs,
            "ties": self.ties,
            "prompts": len(self.prompts),
            "resolutions": dict(
                # Equal counts by name, so that the order does not depend on which part came first.
                sorted(self.resolutions.items(), key=lambda item: (-item[1], item[0]))
            ),
            "preferences": dict(sorted(self.preferences.items())),
        }
