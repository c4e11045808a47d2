"""Files on local disks and in object storage: atomic writes, JSON, staging.

A local file is written under a temporary name and renamed. Object storage shows a file only
when it is complete, so there it is written directly.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec
from etils import epath

from dmpo_jax.errors import MissingPackageError, UserError
from dmpo_jax.extras import install_hint

PART = ".part"  # suffix of temporary names
HASH_AT_ONCE = 2**22
# A sample of a file: blocks at even distances, the first and the last among them. In object
# storage each is a request.
BLOCK, BLOCKS, REMOTE_BLOCKS = 2**16, 64, 2


def is_remote(path: epath.PathLike) -> bool:
    """True if a path is in object storage."""
    return "://" in os.fspath(path)


def check_filesystem(path: epath.PathLike) -> None:
    """Raises UserError if the package is missing that reads a remote path's file system."""
    protocol = os.fspath(path).partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}.get(protocol)
        how = install_hint(extra) if extra else error
        raise MissingPackageError(f"{path} needs a package that is not installed: {how}") from error
    except ValueError:
        return  # no protocol of fsspec: opening it fails


def may_be_folder(path: epath.PathLike) -> bool:
    """True if `path` is a folder that can be written, or may become one; any remote path may.

    Raises:
        UserError: as `check_filesystem`.
    """
    if is_remote(path):
        check_filesystem(path)
        return True
    found = pathlib.Path(path).absolute()
    while not os.path.lexists(found):
        found = found.parent
    return found.is_dir() and os.access(found, os.W_OK)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path; URLs are unchanged."""
    found = epath.Path(path)
    # `absolute` would turn a URL into a local path.
    return found if is_remote(path) else found.absolute()


def temporary(path: epath.Path) -> epath.Path:
    """Returns the temporary name of a file that is still being written."""
    return path.with_name(path.name + PART)


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a path to write to; the file appears at `path` if the block ends without an error.

    A reader sees the old content or all of the new.
    """
    path = epath.Path(path)
    if is_remote(path):
        yield path
        return
    part = temporary(path)
    try:
        with naming(path):
            yield part
            part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Names a file in an OSError without one: a write to a full disk does not say where."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
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
    """Reads a JSON file.

    Raises:
        UserError: the file is missing or is not valid JSON.
    """
    path = epath.Path(path)
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def find_json(path: epath.PathLike) -> Any:
    """Reads a JSON file; None if it is missing or not valid JSON."""
    try:
        return read_json(path)
    except UserError:
        return None


def hash_file(path: epath.PathLike) -> str:
    """Returns the sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(HASH_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def sample_file(path: epath.PathLike) -> str:
    """Returns a sha256 over a file's size and a sample of its bytes: 4 MB of a local file.

    Local files up to that size are hashed in full. Another training run, another file of the same
    shape, noise, a cut or an inserted row change it; a single flipped bit of a large file need not.
    """
    path = epath.Path(path)
    blocks = REMOTE_BLOCKS if is_remote(path) else BLOCKS
    size = path.stat().length
    digest = hashlib.sha256(str(size).encode())
    last = max(size - BLOCK, 0)
    starts = range(0, size, BLOCK) if size <= blocks * BLOCK else _spread(last, blocks)
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _spread(last: int, count: int) -> list[int]:
    return [last * i // (count - 1) for i in range(count)]


def hash_json(value: Any) -> str:
    """Returns the sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def list_names(folder: epath.Path) -> set[str]:
    """Returns the names of the files and folders in a folder."""
    return {path.name for path in folder.iterdir()}


def first_incomplete(
    folder: epath.Path, files: Mapping[str, int], present: set[str] | None = None
) -> str | None:
    """Returns the first of the files (name -> size in bytes) that is missing or of another size.

    None if all are complete. In object storage only missing files are found.
    present: `list_names(folder)`, if already known.
    """
    present = list_names(folder) if present is None else present
    for name, size in files.items():
        # Requesting the size of each remote file is slow.
        if name not in present:
            return name
        if not is_remote(folder) and (folder / name).stat().length != size:
            return name
    return None


@contextlib.contextmanager
def local_folder(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields a local folder to write to; its files are copied to `folder` if that is remote."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        yield epath.Path(local)
        for path in epath.Path(local).iterdir():
            path.copy(folder / path.name, overwrite=True)


@contextlib.contextmanager
def local_file(path: epath.Path) -> Iterator[epath.Path]:
    """Yields a local file: `path` itself, or a temporary copy of a remote one."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield path.copy(epath.Path(folder) / path.name)


@contextlib.contextmanager
def local_copy(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields a local folder: `folder` itself, or a temporary copy of a remote one's files."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        for path in folder.iterdir():
            if path.is_file():
                path.copy(epath.Path(local) / path.name)
        yield epath.Path(local)


def stage(folder: epath.Path, files: Mapping[str, int], kind: str, content: str) -> epath.Path:
    """Copies a remote folder's files (name -> size) to a local folder that later runs reuse.

    Args:
        content: a hash of what the files hold. Names and sizes do not tell two folders apart:
            ArrayRecord pads its files.

    Raises:
        UserError: the local folder is another user's, who could have put anything there.
    """
    user = os.geteuid()
    local = epath.Path(tempfile.gettempdir()) / f"dmpo_jax-{kind}-{user}-{content[:16]}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(local, 0o700)
    about = os.lstat(local)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != user:
        raise UserError(f"{local}, for the copy of {folder}, is another user's: set TMPDIR")
    for name, size in files.items():
        target = local / name
        if target.exists() and target.stat().length == size:
            continue
        # The name includes the process id: processes of one machine may stage at the same time.
        part = temporary(local / f"{name}.{os.getpid()}")
        (folder / name).copy(part, overwrite=True).replace(target)
    return local
