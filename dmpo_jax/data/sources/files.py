"""Files of a source: those that the user names, and those that the cells of a row name."""

import errno
import os
import posixpath
import stat
from collections.abc import Mapping
from typing import Any

from etils import epath

from dmpo_jax import storage
from dmpo_jax.data.sources import rows
from dmpo_jax.data.sources.rows import SkipError
from dmpo_jax.errors import MissingFileError, UserError

REMOTE = ("gs://", "s3://")
# Errors of the machine or of a network file system: to read the same file later may succeed.
_TRANSIENT = (errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT)


def find_files(path: epath.Path, suffix: str) -> list[epath.Path]:
    """Returns the files of a path, a folder or a pattern, sorted.

    Raises:
        FileNotFoundError: there is none.
        UserError: one of them is no regular file.
    """
    if "*" in path.name:
        files = sorted(path.parent.glob(path.name))
    elif path.is_dir():
        files = sorted(path.glob(f"*{suffix}"))
    else:
        files = [path] if path.exists() else []
    if not files:
        raise MissingFileError(f"no {suffix.lstrip('.')} file at {path}")
    for file in files:
        check_regular(file)
    return files


def check_regular(file: epath.Path) -> None:
    """Raises UserError if a local path is a folder, a FIFO or a device: to read it may hang."""
    if storage.is_remote(file):
        return
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if not regular:
        raise UserError(f"{file} should be a file, but is a folder, a FIFO or a device")


def load_image(cell: Any, folder: epath.Path, *, allow_outside: bool) -> bytes:
    """Returns the encoded image of a table's cell: bytes, a path, or a `datasets` image of either.

    Args:
        folder: the table's. Paths are relative to it.
        allow_outside: also read files outside the folder. A table from elsewhere could otherwise
            name any file of this machine, whose content would then be in what is published.

    Raises:
        SkipError: there is no image, it is absurdly large, or it is no regular file in the folder.
        UserError: the storage fails.
    """
    if isinstance(cell, Mapping):  # datasets' Image, as stored
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        cell = _read_file(_locate(cell, folder, allow_outside))
    if cell is not None and not isinstance(cell, bytes | str):
        raise SkipError("no image", f"should be bytes or a path, but is {cell!r:.80}")
    if not cell:
        raise SkipError("no image")
    if len(cell) > rows.MAX_BYTES:
        raise SkipError("absurd size", f"an encoded image of more than {rows.MAX_BYTES} bytes")
    return cell  # pyright: ignore[reportReturnType] - a path was read above


def _locate(cell: str, folder: epath.Path, allow_outside: bool) -> epath.Path:
    """Returns the file that a cell names; raises SkipError if it must not or cannot be read."""
    if storage.is_remote(cell) and not cell.startswith(REMOTE):
        raise SkipError("no image", f"{cell:.200} is a URL: download it and give the file's path")
    if "\0" in cell:
        raise SkipError("no image", f"{cell!r:.80} is no path")
    if storage.is_remote(cell) or storage.is_remote(folder):
        inside, base = posixpath.normpath, os.fspath(folder)
        # An absolute cell is a local path, not one of the bucket.
        named = cell if storage.is_remote(cell) or cell[0] == "/" else f"{base}/{cell}"
    else:
        inside, base = os.path.realpath, os.fspath(folder)
        named = os.path.join(base, cell)
    if not allow_outside and not f"{inside(named)}/".startswith(f"{inside(base).rstrip('/')}/"):
        raise SkipError(
            "outside the folder",
            f"{cell:.200} is not in {folder}, the table's own folder: give --allow_outside if you "
            "trust the table",
        )
    return epath.Path(named)


def _read_file(path: epath.Path) -> bytes:
    try:
        if storage.is_remote(path):
            with path.open("rb") as file:
                return file.read(rows.MAX_BYTES + 1)
        return _read_local(os.fspath(path))
    except Exception as error:
        code = getattr(error, "errno", None)
        if isinstance(error, FileNotFoundError):
            raise SkipError("no image", f"no file {path}") from error
        if storage.is_remote(path) or code in _TRANSIENT:
            raise UserError(
                f"{path} cannot be read now: {error}. Run the same command again later"
            ) from error
        if isinstance(error, OSError):
            raise SkipError("no image", f"{path}: {error.strerror or error}") from error
        raise


def _read_local(path: str) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise SkipError("no image", f"{path} is a folder, a FIFO or a device, not a file")
    # Not blocking, in case that the file was replaced by a FIFO since.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > rows.MAX_BYTES:
            raise SkipError("absurd size", f"{path} has {size} bytes, above {rows.MAX_BYTES}")
        return file.read(size)  # nothing of /proc, whose files have size 0 and may not end
