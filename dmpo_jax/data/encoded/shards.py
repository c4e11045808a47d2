"""ArrayRecord files and small JSON files that are whole or absent, on local and remote folders.

A local file is written aside and renamed; a remote one is written locally and copied, since
ArrayRecord writes local files only and object storage shows a file whole or not at all.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

# group_size 1: reading one record must not decompress its neighbours. zstd's first level is a
# ninth of the default's time for 2 % more bytes, measured on latents.
OPTIONS = "group_size:1,zstd:1"
READ_AT_ONCE = 2**22


class Shard(NamedTuple):
    """A file that was written: records in it, their bytes in all, the file's size and sha256."""

    name: str
    records: int
    record_bytes: int
    size: int
    sha256: str


def is_remote(folder: epath.Path) -> bool:
    """Whether the folder lies in object storage."""
    return "://" in os.fspath(folder)


class ShardWriter:
    """One ArrayRecord file, which appears whole in `folder` at `close`, or not at all.

    A context manager: leaving it without `close` (an error, say) leaves nothing behind. What
    a killed process leaves behind (`.NAME.partial`) the next writer of the name overwrites.
    """

    def __init__(self, folder: epath.PathLike, name: str):
        self._folder, self._name = epath.Path(folder), name
        self._aside: str | None = None
        if is_remote(self._folder):
            self._aside = tempfile.mkdtemp()
            self._part = os.path.join(self._aside, name)
        else:
            self._part = os.fspath(self._folder / f".{name}.partial")
        open_writer: Any = ArrayRecordWriter
        self._writer = open_writer(self._part, OPTIONS)
        self._records = self._record_bytes = 0
        self._done = False

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._done:
            self._writer.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._part)
        if self._aside is not None:
            shutil.rmtree(self._aside, ignore_errors=True)

    def write(self, record: bytes) -> None:
        """Appends a record."""
        self._writer.write(record)
        self._records += 1
        self._record_bytes += len(record)

    def close(self) -> Shard:
        """Makes the file appear, whole."""
        self._writer.close()
        self._done = True
        with open(self._part, "rb+") as file:
            os.fsync(file.fileno())  # renamed only once it is on the disk
            digest = hashlib.sha256()
            while block := file.read(READ_AT_ONCE):
                digest.update(block)
            size = file.tell()
        if self._aside is None:
            os.replace(self._part, self._folder / self._name)
        else:
            epath.Path(self._part).copy(self._folder / self._name, overwrite=True)
        return Shard(self._name, self._records, self._record_bytes, size, digest.hexdigest())


def save_json(path: epath.Path, value: Any) -> None:
    """Writes JSON so that a reader finds the old content or all of the new."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    if is_remote(path):
        path.write_text(text)
        return
    part = path.with_name(f".{path.name}.partial")
    part.write_text(text)
    part.replace(path)


def load_json(path: epath.Path) -> Any:
    """What `save_json` wrote; None where there is nothing, or a copy of it was cut short."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def list_names(folder: epath.Path) -> set[str]:
    """The names of what lies in a folder."""
    return {path.name for path in folder.iterdir()}


def first_not_whole(
    folder: epath.Path, files: Mapping[str, int], present: set[str] | None = None
) -> str | None:
    """The first of the files (name -> size in bytes) that is missing or cut short, or None.

    present: `list_names(folder)`, where it is known already.
    """
    present = list_names(folder) if present is None else present
    for name, size in files.items():
        # Asking each remote file for its size is slow.
        if name not in present:
            return name
        if not is_remote(folder) and (folder / name).stat().length != size:
            return name
    return None


@contextlib.contextmanager
def local_copy_of(folder: epath.Path) -> Iterator[epath.Path]:
    """Where to write what only local files can be: the folder, or one that is copied to it."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        yield epath.Path(local)
        for path in epath.Path(local).iterdir():
            path.copy(folder / path.name, overwrite=True)


def stage(folder: epath.Path, files: Mapping[str, int], kind: str) -> epath.Path:
    """A local copy, kept between runs; files that are already there are not copied again."""
    key = hashlib.sha256(json.dumps([os.fspath(folder), files]).encode()).hexdigest()[:16]
    local = epath.Path(tempfile.gettempdir()) / f"dmpo_jax-{kind}-{key}"
    local.mkdir(parents=True, exist_ok=True)
    for name, size in files.items():
        target = local / name
        if target.exists() and target.stat().length == size:
            continue
        # Under a name of its own until whole: processes of one machine stage at once.
        partial = (folder / name).copy(local / f"{name}.{os.getpid()}", overwrite=True)
        partial.replace(target)
    return local
