"""Files on local disks and in object storage: atomic writes, JSON, staging.

A local file is written under its temporary name and renamed. Object storage shows a file
only when it is complete, so there it is written directly.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dmpo_jax.errors import UserError

PART = ".part"  # suffix of temporary names


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies in object storage."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root; URLs stay as they are."""
    found = epath.Path(path)
    # `absolute` would make a local folder of a URL.
    return found if is_remote(path) else found.absolute()


def temporary(path: epath.Path) -> epath.Path:
    """The name that a file bears until it is complete."""
    return path.with_name(path.name + PART)


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields where to write a file; it appears at `path` when the block ends without an error.

    A reader finds the old content or all of the new.
    """
    path = epath.Path(path)
    if is_remote(path):
        yield path
        return
    part = temporary(path)
    try:
        yield part
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file atomically."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_json(path: epath.PathLike, value: Any, *, sort_keys: bool = False) -> None:
    """Writes a JSON file atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys)
    write_bytes(path, f"{text}\n".encode())


def read_json(path: epath.PathLike) -> Any:
    """The value of a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    path = epath.Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def find_json(path: epath.PathLike) -> Any:
    """The value of a JSON file; None where it is missing or truncated."""
    try:
        return read_json(path)
    except UserError:
        return None


def list_names(folder: epath.Path) -> set[str]:
    """The names of the files and folders in a folder."""
    return {path.name for path in folder.iterdir()}


def first_incomplete(
    folder: epath.Path, files: Mapping[str, int], present: set[str] | None = None
) -> str | None:
    """The first of the files (name -> size in bytes) that is missing or truncated, or None.

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
def local_folder(folder: epath.Path) -> Iterator[epath.Path]:
    """A local folder to write to; its files are copied to `folder` where that is remote."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        yield epath.Path(local)
        for path in epath.Path(local).iterdir():
            path.copy(folder / path.name, overwrite=True)


@contextlib.contextmanager
def local_file(path: epath.Path) -> Iterator[epath.Path]:
    """A local file of the same content: the file itself, or a temporary copy of a remote one."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield path.copy(epath.Path(folder) / path.name)


def stage(folder: epath.Path, files: Mapping[str, int], kind: str) -> epath.Path:
    """A local copy of a remote folder's files (name -> size), kept between runs."""
    key = hashlib.sha256(json.dumps([os.fspath(folder), files]).encode()).hexdigest()[:16]
    local = epath.Path(tempfile.gettempdir()) / f"dmpo_jax-{kind}-{key}"
    local.mkdir(parents=True, exist_ok=True)
    for name, size in files.items():
        target = local / name
        if target.exists() and target.stat().length == size:
            continue
        # A temporary name of this process's own: several processes of one machine may stage.
        part = temporary(local / f"{name}.{os.getpid()}")
        (folder / name).copy(part, overwrite=True).replace(target)
    return local
