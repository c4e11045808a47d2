"""A diffusers folder's files: where it is, its JSON, and which files hold its weights."""

import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from dmpo_jax import storage
from dmpo_jax.errors import UserError

SHOWN = 4  # names that a message lists before it counts the rest


def some(names: Sequence[str]) -> str:
    """`a, b, c, d and 596 more`: an error's line stays a line."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def one_line(error: Exception) -> str:
    """What a library says over many lines, in one that is not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 600 else f"{text[:600]} ..."


def find_folder(folder: epath.PathLike) -> epath.Path:
    """A local or object-storage path as it is; a hub id (`org/name`), downloaded and cached.

    Raises:
        ValueError: neither a folder nor an id that the hub client could fetch.
    """
    path = epath.Path(folder)
    if path.is_dir():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not str(folder).startswith("."):
        from huggingface_hub import snapshot_download

        try:
            # Weights are safetensors alone: nothing else of a repository is code or pickle.
            patterns = ["*.json", "*.txt", "*.safetensors", "*.model"]
            return epath.Path(snapshot_download(str(folder), allow_patterns=patterns))
        except Exception as error:
            reason = one_line(error)
            raise UserError(
                f"{str(folder)!r} is no local folder, and fetching it as a hub id failed: {reason}"
            ) from error
    raise UserError(f"model folder {str(folder)!r} does not exist")


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object of a diffusers folder; UserError names a file that is missing or broken."""
    if not path.exists():
        raise UserError(f"{path} is missing: is {path.parent} a complete diffusers folder?")
    value = storage.read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, but holds a {type(value).__name__}")
    return value


def component(folder: epath.PathLike, subfolder: str) -> epath.Path:
    """The pipeline's subfolder, or the folder itself where it already is the component's.

    Raises:
        ValueError: it holds no config.json.
    """
    path = find_folder(folder)
    if (path / "model_index.json").exists() or (path / subfolder).is_dir():
        path = path / subfolder
    if not (path / "config.json").exists():
        raise UserError(f"{path} has no config.json: the folder lacks its {subfolder!r} part")
    return path


def weight_files(
    folder: epath.Path, stem: str, variant: str | None
) -> dict[epath.Path, frozenset[str]]:
    """The component's safetensors files -> the tensors that an index expects in each.

    Raises:
        ValueError: no such file, a shard that is missing, or an index that is none.
    """
    middle = f".{variant}" if variant else ""
    single = folder / f"{stem}{middle}.safetensors"
    if single.exists():
        return {single: frozenset()}
    index = folder / f"{stem}.safetensors.index{middle}.json"
    if index.exists():
        return _shards(index)
    found = sorted(p.name for p in folder.iterdir() if "json" not in p.suffix)
    hint = (
        "; pickles (.bin, .ckpt) are never opened: save it again with safe_serialization=True"
        if any(name.endswith((".bin", ".ckpt", ".pt")) for name in found)
        else "; choose one of these with variant="
        if found
        else ""
    )
    raise UserError(f"{single} (or its index) is missing in {folder}; found {found}{hint}")


def _shards(index: epath.Path) -> dict[epath.Path, frozenset[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_name, weight_map.values())):
        raise UserError(
            f"{index} should map tensors to .safetensors files of its folder under 'weight_map': "
            "copy the folder again"
        )
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(shard, set()).add(tensor)
    if missing := sorted(s for s in shards if not (index.parent / s).exists()):
        raise UserError(f"{index} names {len(missing)} shards that are missing: {some(missing)}")
    return {index.parent / shard: frozenset(shards[shard]) for shard in sorted(shards)}


def _is_name(shard: Any) -> bool:
    return isinstance(shard, str) and re.fullmatch(r"[\w.-]+\.safetensors", shard) is not None
