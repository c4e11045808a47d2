"""Pairs in tar shards in WebDataset's layout."""

import array
import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from dmpo_jax.data import tables
from dmpo_jax.data.sources import columns, rows
from dmpo_jax.data.sources.files import find_files
from dmpo_jax.data.sources.rows import Row, SkipError, Skipped, guard, shown
from dmpo_jax.data.sources.source import UNIT_PAIRS, Source, Unit, cut
from dmpo_jax.errors import UserError

_KINDS = "(?:jpg|jpeg|png|webp|gif|bmp|tif|tiff)"
_ROLE = r"(\d{1,6}|chosen|rejected|source|mask)"
# jpg_0, jpg_source; 0.jpg, image_0.jpg, chosen.jpg
_IMAGE = re.compile(rf"{_KINDS}_{_ROLE}|(?:images?[_.])?{_ROLE}\.{_KINDS}")
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # WebDataset's own rule
_TEXTS = ("txt", "text", "prompt", "caption")
_IMAGE_COLUMNS = ("chosen", "rejected", "image_0", "image_1", "images", "source", "mask")
_NOT_IN_JSON = {name for column in _IMAGE_COLUMNS for name in columns.NAMES[column]}
_THREADS = 16
_FIRST = 100  # samples of which one must show the layout
_BLOCK = 512  # bytes of a tar header


class Sample(NamedTuple):
    """The members of one key in a shard.

    start: byte of the first member's header. texts: by kind (json, txt, ...).
    images: by role (0, 1, chosen, ...). twice: roles that recur.
    """

    key: str
    start: int
    texts: dict[str, tarfile.TarInfo]
    images: dict[str, tarfile.TarInfo]
    twice: list[str]

    @property
    def pairs(self) -> int:
        """Upper bound on the sample's pairs."""
        return max(math.comb(sum(map(str.isdigit, self.images)), 2), 1)


class Index(NamedTuple):
    """Samples of a shard: `Sample.start` of each, and an upper bound on its pairs."""

    starts: Sequence[int]
    pairs: Sequence[int]


class WebDatasetSource(Source):
    """Pairs in WebDataset's tar shards: consecutive members `KEY.WHAT` of one key are a sample.

    Images are `jpg_0` and `jpg_1` (or `0.jpg`, `image_0.jpg`; also jpeg, png, webp), or
    `chosen.jpg` and `rejected.jpg`, or `jpg_0` ... `jpg_K` of a ranked list. `jpg_source` and
    `png_mask` (or `mask.png`) are source and mask. `json` is an object with the prompt and the
    other columns of `FORMS`; `txt` may hold the prompt instead. Shards are read with the standard
    library's tarfile and must be uncompressed.

    Args:
        path: a tar file, a folder of them, or a pattern.
        ties: "keep", with a preference of 0.5, or "drop".

    Raises:
        FileNotFoundError: there is no tar file.
        ValueError: the first sample is invalid. Also raised at the first use of `units` or `len`,
            which read every shard's headers, if a shard is damaged.
    """

    def __init__(self, path: epath.PathLike, ties: str = "keep", allow_outside: bool = False):
        super().__init__(ties, allow_outside)  # a tar file names no others
        self._files = find_files(epath.Path(path), ".tar")
        self._indices: dict[str, Index] = {}
        self.layout = _find_layout(self._files, str(path))
        self.given = self.layout.given

    def units(self) -> list[Unit]:
        units = []
        for file, pairs in zip(self._files, self._pairs_by_file(), strict=True):
            size = UNIT_PAIRS // self._most(pairs)
            units += cut(file.name, file, len(pairs), size)
        return units

    def rows(self, unit: Unit, *, images: bool) -> Iterator[Row]:
        for tar, name, sample in self._samples_of(unit):
            fetch = functools.partial(_to_row, tar, sample)
            yield Row(name, fetch, functools.partial(_extract, tar))

    def __len__(self) -> int:
        if len(self.layout.images) == 2:
            return sum(map(len, self._pairs_by_file()))
        return sum(map(sum, self._pairs_by_file()))

    def _most(self, pairs: Sequence[int]) -> int:
        return max(pairs, default=1) if len(self.layout.images) == 1 else 1

    def _pairs_by_file(self) -> list[Sequence[int]]:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            return [index.pairs for index in pool.map(self._index, self._files)]

    def _index(self, file: epath.Path) -> Index:
        """Returns the index of a shard; reads its headers once."""
        name = os.fspath(file)
        if name not in self._indices:
            self._indices[name] = _read_index(file)
        return self._indices[name]

    def _samples_of(self, unit: Unit) -> Iterator[tuple[tarfile.TarFile, str, Sample]]:
        """Yields (shard, id, sample) of a unit; reads from its first sample on."""
        file = epath.Path(unit.file)
        starts = self._index(file).starts
        number = unit.start if unit.start < len(starts) else 0
        with _opened(file, starts[number] if number else 0) as tar:
            for sample in _samples(tar, file):
                number += 1
                if number > unit.start:
                    yield tar, f"{file.name}:{sample.key}", sample
                if number == unit.stop:
                    return
        raise UserError(f"{file} should hold {unit.stop} samples, but holds {number}")


def _find_layout(files: list[epath.Path], path: str) -> columns.Layout:
    """Returns the layout of the first sample that has one.

    Raises:
        UserError: none of the first samples of the first shard that holds any has a layout.
    """
    for file in files:
        first: UserError | None = None
        with _opened(file) as tar:
            for sample in itertools.islice(_samples(tar, file), _FIRST):
                where = f"{file}, sample {shown(sample.key)}"
                row = guard(where, functools.partial(_to_row, tar, sample))
                try:
                    if isinstance(row, Skipped):
                        raise UserError(f"{where}: {row.reason}: {row.detail}")
                    return columns.find_layout(list(row), where)
                except UserError as error:
                    first = first or error
        if first is not None:
            raise first
    raise UserError(f"the shards at {path} hold no sample: members are KEY.jpg_0, ...")


def _read_index(file: epath.Path) -> Index:
    starts, pairs = array.array("q"), array.array("l")
    with _opened(file) as tar:
        for sample in _samples(tar, file):
            starts.append(sample.start)
            pairs.append(sample.pairs)
    return Index(starts, pairs)


@contextlib.contextmanager
def _opened(file: epath.Path, start: int = 0) -> Iterator[tarfile.TarFile]:
    """Opens a shard at the header that begins at byte `start`.

    Raises:
        ValueError: the shard, or data read from it, is damaged.
    """
    with file.open("rb") as stream:
        stream.seek(start)
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                yield tar
        except UserError:
            raise
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise UserError(f"{file} is not a complete tar file: {error}") from error


def _samples(tar: tarfile.TarFile, file: epath.Path) -> Iterator[Sample]:
    """Yields the samples of a shard, in order."""
    sample, keys = None, set()
    for info in _members(tar, file):
        match = _KEY.fullmatch(info.name)
        if not match:
            continue
        key, what = match[1], match[2].lower()
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in keys:
                raise UserError(f"{file}: the members of {shown(key)} should stand together")
            keys.add(key)
            sample = Sample(key, info.offset, {}, {}, [])
        image = _IMAGE.fullmatch(what)
        role = what if image is None else image[1] or image[2]
        role = str(int(role)) if role.isdigit() else role
        members = sample.texts if image is None else sample.images
        if role in members:
            sample.twice.append(role)
        members[role] = info
    if sample is not None:
        yield sample


def _members(tar: tarfile.TarFile, file: epath.Path) -> Iterator[tarfile.TarInfo]:
    """Yields the files in a shard; raises ValueError if a header is damaged or the end is missing.

    tarfile takes a damaged header for the end.
    """
    last = -1
    for info in tar:
        if info.offset <= last or info.size < 0:  # would loop forever
            raise UserError(f"{file} is not a complete tar file: bad header of {info.name!r:.80}")
        last = info.offset
        if info.isreg():
            yield info
    stream: Any = tar.fileobj
    stream.seek(tar.offset)
    rest, found = stream.read(2**20), 0
    while rest:
        if rest.strip(b"\0"):
            raise UserError(f"{file} is not a complete tar file: bad header at byte {tar.offset}")
        found += len(rest)
        rest = stream.read(2**20)
    if found < _BLOCK:
        raise UserError(f"{file} is not a complete tar file: cut at byte {tar.offset + found}")


def _to_row(tar: tarfile.TarFile, sample: Sample) -> dict[str, Any]:
    """Returns a sample as a table's row, its images as unread tar members."""
    if sample.twice:
        raise SkipError("twice the same", f"members {sample.twice}")
    row: dict[str, Any] = {}
    if "json" in sample.texts:
        try:
            row = tables.parse_json(_extract(tar, sample.texts["json"]))
        except json.JSONDecodeError as error:
            raise SkipError("not JSON", str(error)) from error
        if not isinstance(row, dict):
            raise SkipError("not JSON", f"not an object: {row!r:.80}")
        row = {name: value for name, value in row.items() if name not in _NOT_IN_JSON}
    for kind in _TEXTS:
        if kind in sample.texts and not {"prompt", "caption"} & set(row):
            row["prompt"] = _extract(tar, sample.texts[kind]).decode("utf-8-sig").strip()
    numbers = [int(role) for role in sample.images if role.isdigit()]
    if max(numbers, default=0) >= columns.MAX_IMAGES:
        raise SkipError("uneven lists", f"image {max(numbers)} of up to {columns.MAX_IMAGES}")
    for role, info in sample.images.items():
        row[f"image_{role}" if role.isdigit() else role] = info
    if numbers:
        row["images"] = [sample.images.get(str(i)) for i in range(max(numbers) + 1)]
    return row


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo | None) -> bytes:
    if info is None or not info.size:
        raise SkipError("no image")
    if info.size > rows.MAX_BYTES:
        raise SkipError("absurd size", f"{info.name} has {info.size} bytes, above {rows.MAX_BYTES}")
    stream = tar.extractfile(info)
    data = b"" if stream is None else stream.read()
    if len(data) != info.size:  # the next header will not be found, and the file be refused
        raise tarfile.ReadError(f"{info.name} is cut short")
    return data
