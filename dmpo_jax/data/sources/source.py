"""`Source`, the base class of all sources of raw pairs."""

import abc
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from dmpo_jax.data.sources.columns import Layout
from dmpo_jax.data.sources.rows import RawPair, Row, Skipped, guard
from dmpo_jax.errors import UserError, printable

UNIT_PAIRS = 1000  # approximate pairs of a unit


class Unit(NamedTuple):
    """A part of a source that can be read alone: rows `start` to `stop` of a file."""

    name: str
    file: str
    start: int
    stop: int


class Source(abc.ABC):
    """Pairs in units, in a fixed order.

    layout: of the columns of its rows. given: the fields, of "source" and "mask", that its pairs
    may have. ties: "keep", with a preference of 0.5, or "drop". allow_outside: as `load_image`.
    """

    layout: Layout
    given: frozenset[str] = frozenset()

    def __init__(self, ties: str = "keep", allow_outside: bool = False):
        if ties not in ("keep", "drop"):
            raise UserError(f"ties should be 'keep' or 'drop', but is {ties!r}")
        self.ties, self.allow_outside = ties, allow_outside

    @abc.abstractmethod
    def units(self) -> list[Unit]:
        """Returns the units, in order; together they hold every row once."""

    @abc.abstractmethod
    def rows(self, unit: Unit, *, images: bool) -> Iterator[Row]:
        """Yields the rows of a unit, in order, to be read by `Row.fetch`.

        images: False where only prompts and labels are needed.

        Raises:
            UserError: the file is damaged, and the damaged rows cannot be identified.
        """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns an upper bound on the pairs."""

    def read(self, unit: Unit) -> Iterator[RawPair | Skipped]:
        """Yields the pairs of a unit, the same at every read; raises as `rows`."""
        for row in self.rows(unit, images=True):
            name = printable(row.name, keep="")
            found = guard(name, lambda row=row, name=name: self._pairs(unit, row, name))
            yield from [found] if isinstance(found, Skipped) else found

    def prompts(self, unit: Unit) -> Iterator[str]:
        """Yields the prompt of each row that labels admit; avoids reading images where possible."""
        for row in self.rows(unit, images=False):
            found = guard(row.name, lambda row=row: self._prompts(unit, row))
            if not isinstance(found, Skipped):
                yield from found

    def _layout_of(self, unit: Unit) -> Layout:
        return self.layout

    def _pairs(self, unit: Unit, row: Row, name: str) -> list[RawPair | Skipped]:
        return list(self._layout_of(unit).pairs(name, row.fetch(), row.load, self.ties))

    def _prompts(self, unit: Unit, row: Row) -> list[str]:
        return list(self._layout_of(unit).prompts(row.fetch(), self.ties))

    def _most_pairs(self, unit: Unit, row: Row) -> int:
        """Returns an upper bound on the pairs of a row; a row that is skipped counts as one."""
        found = guard(row.name, lambda: self._layout_of(unit).most_pairs(row.fetch()))
        return 1 if isinstance(found, Skipped) else found


def cut(name: str, file: epath.PathLike, rows: int, size: int = UNIT_PAIRS) -> list[Unit]:
    """Returns units of at most `size` rows of a file."""
    starts = range(0, rows, max(size, 1))
    return [make_unit(name, file, i, min(i + starts.step, rows)) for i in starts]


def make_unit(name: str, file: epath.PathLike, start: int, stop: int) -> Unit:
    return Unit(f"{name}:{start}-{stop}", str(file), start, stop)
