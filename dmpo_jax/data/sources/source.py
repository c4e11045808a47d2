"""`Source`, the base class of all sources of raw pairs, and the records that they yield."""

import abc
import errno
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from dmpo_jax import storage
from dmpo_jax.data.sources.images import MAX_BYTES
from dmpo_jax.errors import MissingFileError, UserError

UNIT_PAIRS = 1000  # approximate pairs of a unit
# Errors of a path that names no file: the row is skipped. Other storage errors stop the job.
_NO_SUCH_FILE = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL}


class RawPair(NamedTuple):
    """Two encoded images (JPEG, PNG, ...) of one prompt, in the order of the source.

    preference: the probability, in [0, 1], that image 0 is preferred; 0.5 is a tie.
    source: the encoded image that both images edit or repaint. mask: an encoded image of the
    source's shape, white where the source is repainted.
    """

    id: str
    prompt: str
    images: tuple[bytes, bytes]
    preference: float
    source: bytes | None = None
    mask: bytes | None = None


class Skipped(NamedTuple):
    """A row, or one pair of a row, that yields no pair.

    reason: a few words, the same for every such row. bad: True for a bad record, False for a
    record skipped by rule (no label, a tie where ties are dropped).
    """

    id: str
    reason: str
    detail: str = ""
    bad: bool = True


class Unit(NamedTuple):
    """A part of a source that can be read alone: rows `start` to `stop` of a file."""

    name: str
    file: str
    start: int
    stop: int


class SkipError(Exception):
    """Signals, inside a source, that a row must be skipped; becomes a `Skipped`."""

    def __init__(self, reason: str, detail: str = "", *, bad: bool = True):
        super().__init__(reason, detail, bad)
        self.reason, self.detail, self.bad = reason, detail, bad

    def at(self, name: str) -> Skipped:
        return Skipped(name, self.reason, self.detail, self.bad)


class Source(abc.ABC):
    """Pairs in units, in a fixed order.

    given: the fields, of "source" and "mask", that its pairs may have.
    """

    given: frozenset[str] = frozenset()

    def __init__(self, ties: str = "keep"):
        if ties not in ("keep", "drop"):
            raise UserError(f"ties should be 'keep' or 'drop', but is {ties!r}")
        self.ties = ties

    @abc.abstractmethod
    def units(self) -> list[Unit]:
        """Returns the units, in order; together they hold every row once."""

    @abc.abstractmethod
    def read(self, unit: Unit) -> Iterator[RawPair | Skipped]:
        """Yields the pairs of a unit, the same at every read.

        Raises:
            ValueError: the file is damaged, and the damaged rows cannot be identified.
        """

    @abc.abstractmethod
    def prompts(self, unit: Unit) -> Iterator[str]:
        """Yields the prompt of each row that labels admit; avoids reading images where possible."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns an upper bound on the pairs."""


def find_files(path: epath.Path, suffix: str) -> list[epath.Path]:
    """Returns the files of a path, a folder or a pattern, sorted.

    Raises:
        FileNotFoundError: there is none.
    """
    if "*" in path.name:
        files = sorted(path.parent.glob(path.name))
    elif path.is_dir():
        files = sorted(path.glob(f"*{suffix}"))
    else:
        files = [path] if path.exists() else []
    if not files:
        raise MissingFileError(f"no {suffix.lstrip('.')} file at {path}")
    return files


def cut(name: str, file: epath.PathLike, rows: int, size: int = UNIT_PAIRS) -> list[Unit]:
    """Returns units of at most `size` rows of a file."""
    starts = range(0, rows, max(size, 1))
    return [make_unit(name, file, i, min(i + starts.step, rows)) for i in starts]


def make_unit(name: str, file: epath.PathLike, start: int, stop: int) -> Unit:
    return Unit(f"{name}:{start}-{stop}", str(file), start, stop)


def load_bytes(cell: Any, folder: epath.Path) -> bytes:
    """Returns the encoded image of a table's cell: bytes, a path, or a `datasets` image of either.

    Paths are relative to the folder.

    Raises:
        SkipError: there is no image, or it is absurdly large.
    """
    if isinstance(cell, Mapping):  # datasets' Image, as stored
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        cell = _read_file(epath.Path(cell) if storage.is_remote(cell) else folder / cell)
    if cell is not None and not isinstance(cell, bytes | str):
        raise SkipError("no image", f"should be bytes or a path, but is {cell!r:.80}")
    if not cell:
        raise SkipError("no image")
    if len(cell) > MAX_BYTES:
        raise SkipError("absurd size", f"an encoded image of more than {MAX_BYTES} bytes")
    return cell  # pyright: ignore[reportReturnType] - a path was read above


def _read_file(path: epath.Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno in _NO_SUCH_FILE:
            raise SkipError("no image", f"no file {path}") from error
        raise
    except ValueError as error:  # a zero byte in the path
        raise SkipError("no image", f"{str(path)!r:.80}: {error}") from error
