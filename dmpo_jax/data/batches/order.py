"""Order and random draws of the endless shuffled data, as functions of (seed, element).

Nothing here is stateful, so element 10**12 costs as much as element 0.
"""

import fractions
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from dmpo_jax.errors import UserError

BLOCK = 1024  # elements of a mixture that are shuffled together


class Element(NamedTuple):
    """A record (number `record` of data set `source`), with its dropout and its images' flips."""

    source: int
    record: int
    drops_prompt: bool = False
    drops_image: bool = False
    flips_chosen: bool = False
    flips_rejected: bool = False


class Order:
    """Order of data sets mixed by weight: `order[i]` -> (source, record) of element i.

    Of the first n elements each set has its share, exact to a few whenever n is a multiple of
    1,024. Within 1,024 elements the sets are in random order. Each set has its own epochs: all of
    its pairs occur once before any of them recurs.

    Args:
        lengths: records of each set.
        weights: shares of the elements, in any unit; above 0. One for each set.
        seed: in [0, 2**32).
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float | int], *, seed: int):
        self._parts = whole_parts(weights)
        self._seed = _seed_of(seed, len(lengths))
        sets = []
        for number, length in enumerate(lengths):
            records = grain.MapDataset.range(length).seed(_seed_of(seed, number))
            # Grain shuffles record numbers, not records, and needs no file.
            sets.append(records.shuffle().repeat())
        self._sets = sets
        self._block = functools.lru_cache(maxsize=64)(self._make_block)  # a few batches' worth

    def __getitem__(self, element: int) -> tuple[int, int]:
        if len(self._sets) == 1:
            return 0, self._sets[0][element]
        number, within = divmod(element, BLOCK)
        sources, places = self._block(number)
        source = int(sources[within])
        return source, self._sets[source][int(places[within])]

    def _make_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sources of a block's elements, and their positions in their sources."""
        before, after = (counts_of(n * BLOCK, self._parts) for n in (number, number + 1))
        held = [b - a for a, b in zip(before, after, strict=True)]
        rank = _stream(self._seed, number).random(BLOCK)
        sources = np.repeat(np.arange(len(held)), held)[np.argsort(rank, kind="stable")]
        places = np.empty(BLOCK, np.int64)
        for source, start in enumerate(before):
            places[sources == source] = start + np.arange(held[source])
        return sources, places


def counts_of(n: int, parts: Sequence[int]) -> list[int]:
    """Returns how many of the first n elements belong to each source, in proportions `parts`.

    The first source gets its exact share, rounded up, the next its share of the remainder, and so
    on. No count therefore falls as n grows. Grain's `mix` has the same rule, but also rounds its
    weights.
    """
    counts, rest = [], sum(parts)
    for part in parts:
        left = n * (rest - part) // rest
        counts.append(n - left)
        n, rest = left, rest - part
    return counts


def whole_parts(weights: Sequence[float | int]) -> tuple[int, ...]:
    """Returns the smallest integers in the weights' proportions, read as decimal fractions.

    Raises:
        ValueError: a weight is not above 0 and finite.
    """
    if not all(0 < w < math.inf for w in weights):
        raise UserError(f"weights must be above 0 and finite, but got {list(weights)}")
    exact = [fractions.Fraction(str(w)) for w in weights]  # 0.1 is exactly a tenth
    unit = math.lcm(*(x.denominator for x in exact))
    parts = [int(x * unit) for x in exact]
    divisor = math.gcd(*parts)
    return tuple(x // divisor for x in parts)


class Draws:
    """Random draws of an element: `draws(i)` -> the last four fields of its `Element`.

    Args:
        prompt_dropout: the share of elements that lose their prompt.
        drops_images: drops images too. With p = prompt_dropout / 2, p of the elements lose the
            prompt alone, p the image alone and p both.
        flip: flips half of the elements, both images alike. flip_each: each image by itself.
    """

    def __init__(
        self,
        *,
        seed: int,
        prompt_dropout: float,
        drops_images: bool,
        flip: bool,
        flip_each: bool = False,
    ):
        self._seed, self._dropout = seed, prompt_dropout
        self._drops_images, self._flip, self._each = drops_images, flip, flip_each

    def __call__(self, element: int) -> tuple[bool, bool, bool, bool]:
        stream = _stream(self._seed, element)
        drawn = stream.random()
        # One draw for both: prompt alone below p, both below 2p, image alone below 3p.
        p = self._dropout / 2
        # Drawn last, so that flips do not change the other draws.
        chosen = rejected = self._flip and bool(stream.random() < 0.5)
        if self._flip and self._each:
            rejected = bool(stream.random() < 0.5)
        return (
            drawn < self._dropout,
            self._drops_images and p <= drawn < 3 * p,
            chosen,
            rejected,
        )


def _stream(seed: int, number: int) -> np.random.Generator:
    # Philox is a counter-based generator: a fresh stream for every (seed, number).
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


def _seed_of(seed: int, number: int) -> int:
    """Returns the seed of stream `number`; stream 0 has the seed itself."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
