"""What each element of the endless shuffled data is: a function of (seed, element) alone.

Nothing here counts or remembers, so element 10**12 costs what element 0 does.
"""

import fractions
import math
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

BLOCK = 1024  # elements of a mixture that are shuffled among each other


class Element(NamedTuple):
    """A record (number `record` of data set `source`) and what becomes of it."""

    source: int
    record: int
    drops_prompt: bool = False
    drops_image: bool = False
    flips: bool = False


class Order:
    """Element i of some data sets mixed by weight: `order[i]` -> (source, record).

    Any n elements in a row hold a share of each set that is exact to a few elements within
    a block of 1,024, and the sets' epochs are their own: each pair of a set comes once
    before any of it comes again.

    Args:
        lengths: records of each set.
        weights: shares of the elements, in any unit; above 0. One for each set.
        seed: in [0, 2**32).
        shuffle: a fresh order each epoch, and the sets shuffled among each other; otherwise
            the stored order, again and again, and the sets in turns.
    """

    def __init__(
        self, lengths: Sequence[int], weights: Sequence[float | int], *, seed: int, shuffle: bool
    ):
        self._parts = whole_parts(weights)
        sets = []
        for number, length in enumerate(lengths):
            records = grain.MapDataset.range(length).seed(_seed_of(seed, number))
            # Record numbers are shuffled, not records: Grain then knows no file.
            sets.append((records.shuffle() if shuffle else records).repeat())
        self._sets = sets
        self._slots = None
        if shuffle and len(sets) > 1:
            # In turns, a row of the batch, and so a host or a microbatch, would often hold one
            # set alone.
            slots = grain.MapDataset.range(BLOCK).seed(_seed_of(seed, len(sets)))
            self._slots = slots.shuffle().repeat()

    def __getitem__(self, element: int) -> tuple[int, int]:
        if len(self._sets) == 1:
            return 0, self._sets[0][element]
        if self._slots is not None:
            element = element // BLOCK * BLOCK + self._slots[element]
        source, place = interleave(element, self._parts)
        return source, self._sets[source][place]


def whole_parts(weights: Sequence[float | int]) -> tuple[int, ...]:
    """The smallest whole numbers in the weights' proportions, taken as they are written.

    Raises:
        ValueError: at a weight that is not above 0 and finite.
    """
    if not all(0 < w < math.inf for w in weights):
        raise ValueError(f"weights must be above 0 and finite, but got {list(weights)}")
    exact = [fractions.Fraction(str(w)) for w in weights]  # 0.1 is a tenth here
    unit = math.lcm(*(x.denominator for x in exact))
    parts = [int(x * unit) for x in exact]
    divisor = math.gcd(*parts)
    return tuple(x // divisor for x in parts)


def interleave(i: int, parts: Sequence[int]) -> tuple[int, int]:
    """(source, place) of element i where sources take turns in the proportions `parts`.

    place counts the source's own elements from 0, without a gap. Of any first n elements
    the first source has its exact share, rounded up, the next its share of what is left,
    and so on: the rule of Grain's `mix`, which rounds the weights too.
    """
    rest, after = sum(parts), i + 1
    for source, part in enumerate(parts):
        left, left_after = (x * (rest - part) // rest for x in (i, after))
        if left == left_after:  # the count of all later sources stays, so this one's grows
            return source, i - left
        i, after, rest = left, left_after, rest - part
    raise AssertionError("the last source takes what no other does")


class Draws:
    """What is drawn for an element: `draws(i)` -> (drops_prompt, drops_image, flips).

    Args:
        prompt_dropout: the share of elements that lose their prompt.
        drops_images: whether images are dropped too: half of each come together, so that
            p = prompt_dropout / 2 lose the prompt alone, p the image alone and p both.
        flip: whether half of the elements are flipped.
    """

    def __init__(self, *, seed: int, prompt_dropout: float, drops_images: bool, flip: bool):
        self._seed, self._dropout = seed, prompt_dropout
        self._drops_images, self._flip = drops_images, flip

    def __call__(self, element: int) -> tuple[bool, bool, bool]:
        # Philox is a counter-based generator: a fresh stream for every (seed, element).
        stream = np.random.Generator(
            np.random.Philox(key=np.array([self._seed, element], np.uint64))
        )
        drawn = stream.random()
        # One draw for both: prompt alone below p, both below 2p, image alone below 3p.
        p = self._dropout / 2
        # Drawn second, and whether or not it is asked for: the first stays what it was.
        flips = stream.random() < 0.5
        return (
            drawn < self._dropout,
            self._drops_images and p <= drawn < 3 * p,
            bool(self._flip and flips),
        )


def _seed_of(seed: int, number: int) -> int:
    """Of stream `number`; that of a set alone is the seed itself."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
