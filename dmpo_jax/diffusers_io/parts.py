"""Copies the parts of a pipeline that a run leaves as they are.

A model folder comes from elsewhere and the copy is published, so only files of the parts that
model_index.json names are copied, and none that a link brings in from outside.
"""

import os
import pathlib
import re

from etils import epath

from dmpo_jax import storage
from dmpo_jax.diffusers_io.folders import read_json
from dmpo_jax.errors import UserError

# Weights that another pipeline may have left; a loader could prefer them to the copied ones.
_WEIGHTS = re.compile(r".*\.(safetensors|bin|msgpack|ckpt|pt)(\.index(\..+)?\.json)?")


def check_copy(source: epath.Path, out: epath.PathLike, trained: str) -> dict[str, epath.Path]:
    """Returns {part: its folder} of the parts to copy: all but `trained`, or none in place.

    Raises:
        ValueError: `out` lies inside `source`; the index names a part by a path; a part holds a
            link to something outside the pipeline's folder.
    """
    if _real(source) in _real(out).parents:
        raise UserError(f"{out} lies inside the model folder {source}: choose a folder outside it")
    if is_same(source, out):
        return {}
    parts = {}
    for name, kind in read_json(source / "model_index.json").items():
        if name.startswith("_") or name == trained or not isinstance(kind, list):
            continue
        if not re.fullmatch(r"\w+", name):
            raise UserError(f"{source / 'model_index.json'} names a part {name!r}: not a folder")
        if (source / name).is_dir():
            parts[name] = source / name
    if not storage.is_remote(source):
        for folder in parts.values():
            _check_links(source, folder)
    return parts


def copy_part(source: epath.Path, out: epath.Path) -> None:
    """Copies a part's files; config.json is removed first and copied last.

    Weights that `source` lacks are removed, all else in `out` stays.
    """
    (out / "config.json").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    files = [file for file in sorted(source.iterdir()) if file.is_file()]
    names = {file.name for file in files}
    for stale in out.iterdir():
        if stale.name not in names and _WEIGHTS.fullmatch(stale.name) and stale.is_file():
            stale.unlink()
    for file in sorted(files, key=lambda file: file.name == "config.json"):
        file.copy(out / file.name, overwrite=True)


def _check_links(source: epath.Path, folder: epath.Path) -> None:
    root = _real(source)
    allowed = {root}
    if root.parent.name == "snapshots":  # of the hub's cache, whose files link to its blobs
        allowed.add(root.parent.parent / "blobs")
    for path in (folder, *folder.iterdir()):
        if allowed.isdisjoint(_real(path).parents):
            raise UserError(
                f"{path} is a link to {os.path.realpath(path)}, outside the model folder, and "
                "would be copied into the export: put a copy in its place"
            )


def is_same(folder: epath.PathLike, other: epath.PathLike) -> bool:
    """True if two paths are one folder, also by a link."""
    return _real(folder) == _real(other)


def _real(path: epath.PathLike) -> pathlib.PurePath:
    """Returns the absolute path without links; a URL as it is."""
    text = os.fspath(path)
    return pathlib.PurePath(text if storage.is_remote(text) else os.path.realpath(text))
