"""ArrayRecord files: a writer, atomic in local and remote folders, and reading a record.

ArrayRecord writes only local files, so a remote file is written locally and copied.
"""

import bisect
import contextlib
import itertools
import operator
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from dmpo_jax import storage
from dmpo_jax.errors import UserError

# group_size 1: reading one record must not decompress its neighbours. zstd's level 1 takes a
# ninth of the default's time for 2 % more bytes, measured on latents.
OPTIONS = "group_size:1,zstd:1"


class Shard(NamedTuple):
    """A written file: its records, their total bytes, and the file's size in bytes and sha256."""

    name: str
    records: int
    record_bytes: int
    size: int
    sha256: str


def read_record(source: Any, i: int, files: Sequence[tuple[epath.PathLike, int]]) -> bytes:
    """Returns a record of ArrayRecord files that follow one another.

    Args:
        source: gives their bytes, `source[i]`.
        i: its number, from 0 on; IndexError, which ends a for loop, if there is none.
        files: (path, number of records) of each.

    Raises:
        UserError: the file is damaged; names it and the record in it.
    """
    i = operator.index(i)
    if not 0 <= i < len(source):
        raise IndexError(f"index {i} is outside [0, {len(source)})")
    try:
        return source[i]
    except RuntimeError as error:
        starts = [0, *itertools.accumulate(count for _, count in files)]
        file = bisect.bisect_right(starts, i) - 1
        raise UserError(
            f"{files[file][0]}, record {i - starts[file]}, cannot be read: {error}. The file is "
            "damaged (dmpo-jax verify finds all that are): copy it again, or delete it and run "
            "encode again"
        ) from error


class ShardWriter:
    """Writes one ArrayRecord file, which appears in `folder` at `close`.

    A context manager: leaving it without `close`, as on an error, leaves no file behind. The next
    writer of the name overwrites the remains of a killed process (`storage.temporary`).
    """

    def __init__(self, folder: epath.PathLike, name: str):
        self._folder, self._name = epath.Path(folder), name
        self._aside: str | None = None
        if storage.is_remote(self._folder):
            self._aside = tempfile.mkdtemp()
            self._part = os.path.join(self._aside, name)
        else:
            self._part = os.fspath(storage.temporary(self._folder / name))
        open_writer: Any = ArrayRecordWriter
        with self._told():
            self._writer = open_writer(self._part, OPTIONS)
        self._records = self._record_bytes = 0
        self._done = False

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._done:
            with contextlib.suppress(RuntimeError):  # or it would replace the first error
                self._writer.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._part)
        if self._aside is not None:
            shutil.rmtree(self._aside, ignore_errors=True)

    def write(self, record: bytes) -> None:
        """Appends a record."""
        with self._told():
            self._writer.write(record)
        self._records += 1
        self._record_bytes += len(record)

    def close(self) -> Shard:
        """Completes the file, which then appears in `folder`."""
        with self._told():
            self._writer.close()
        self._done = True
        with open(self._part, "rb+") as file:
            os.fsync(file.fileno())  # must be on disk before the rename
        size, digest = os.path.getsize(self._part), storage.hash_file(self._part)
        if self._aside is None:
            os.replace(self._part, self._folder / self._name)
        else:
            epath.Path(self._part).copy(self._folder / self._name, overwrite=True)
        return Shard(self._name, self._records, self._record_bytes, size, digest)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Names the file in what ArrayRecord raises where the disk fails: a bare RuntimeError."""
        try:
            yield
        except RuntimeError as error:
            raise UserError(
                f"{self._folder / self._name} could not be written: {error}. Make room there; "
                "the same command resumes"
            ) from error
