"""Files of a diffusers folder: its location, its JSON, and the files of its weights."""

import functools
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from dmpo_jax import storage
from dmpo_jax.errors import UserError

LOG = logging.getLogger(__name__)
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w-][\w./-]*))?")
SHOWN = 4  # names listed in a message before the rest is counted


def some(names: Sequence[str]) -> str:
    """Joins names as `a, b, c, d and 596 more`, which keeps an error on one line."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def one_line(error: Exception) -> str:
    """Returns a library's error message on one line, cut at 600 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 600 else f"{text[:600]} ..."


class Located(NamedTuple):
    """A model folder. commit: of the hub repository that it was fetched from, else ""."""

    folder: epath.Path
    commit: str


def resolve(name: epath.PathLike) -> Located:
    """Finds a model folder: a local or object-storage path, or a hub id.

    A hub id is `org/name` or `org/name@revision`, a branch, tag or commit. Its repository is
    downloaded and cached; this process keeps to the commit that it found first.

    Raises:
        ValueError: neither a folder nor an id that the hub client could fetch.
    """
    path = epath.Path(name)
    if path.is_dir():
        _refuse_run(path)
        return Located(path, "")
    if path.exists():
        raise UserError(f"{str(name)!r} is a file, but a model is a diffusers pipeline folder")
    found = _HUB_ID.fullmatch(str(name))
    if found is None:
        raise UserError(f"model folder {str(name)!r} does not exist")
    repository, revision = found["id"], found["revision"]
    if not revision and path.parent.is_dir():
        # A name typed wrong must not be fetched from whoever has registered it.
        raise UserError(
            f"model folder {str(name)!r} does not exist, though {str(path.parent)!r} does; if the "
            f"hub's repository of that name is meant, add a revision: {name}@main"
        )
    folder = _fetch(repository, revision)
    return Located(folder, folder.name)  # the hub's cache names a snapshot by its commit


def find_folder(folder: epath.PathLike) -> epath.Path:
    """Returns a path as is; downloads and caches a hub id. As `resolve`, without the commit."""
    return resolve(folder).folder


def pinned(name: str, before: str = "") -> str:
    """Returns a hub id with its commit, `org/name@commit`; a path and "" are unchanged.

    before: a name that an earlier run recorded; it is kept if it is of this repository and
        `name` asks for no revision, even if the repository has changed since.

    Raises:
        ValueError: as `resolve`.
    """
    if not name:
        return name
    if before and before.partition("@")[0] == name and not epath.Path(name).is_dir():
        return before
    commit = resolve(name).commit
    return f"{hub_id(name)}@{commit}" if commit else name


def is_hub_id(name: str) -> bool:
    """True for `org/name` or `org/name@revision` that is no path."""
    return _HUB_ID.fullmatch(name) is not None and not epath.Path(name).exists()


def hub_id(name: str) -> str:
    """Returns a hub id without its revision; a path is unchanged."""
    return name.partition("@")[0] if is_hub_id(name) else name


@functools.cache
def _fetch(repository: str, revision: str | None) -> epath.Path:
    from huggingface_hub import snapshot_download

    LOG.info("%s is no local folder: fetching it from the hub", repository)
    # Weights are safetensors only: no code or pickle of a repository is downloaded.
    patterns = ["*.json", "*.txt", "*.safetensors", "*.model"]
    try:
        return epath.Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:
        name = f"{repository}@{revision}" if revision else repository
        raise UserError(
            f"{name!r} is no local folder, and fetching it as a hub id failed: {one_line(error)}"
        ) from error


def _refuse_run(path: epath.Path) -> None:
    """Raises UserError, naming its pipeline, if a folder is a run's workdir."""
    if (path / "model_index.json").exists() or not (path / "config.json").exists():
        return
    if (path / "export" / "model_index.json").exists():
        raise UserError(f"{path} is a run's folder; its pipeline is {path / 'export'}: give that")
    if (path / "checkpoints").exists():
        raise UserError(
            f"{path} is a run's folder without a pipeline yet: dmpo-jax convert "
            f"--checkpoint={path} --out=DIR makes one of its newest checkpoint"
        )


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object of a diffusers folder; UserError names a missing or broken file."""
    if not path.exists():
        raise UserError(f"{path} is missing: is {path.parent} a complete diffusers folder?")
    value = storage.read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, but holds a {type(value).__name__}")
    return value


def component(folder: epath.PathLike, subfolder: str) -> epath.Path:
    """Returns the pipeline's subfolder, or the folder itself if it is the component's.

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
    """Maps the component's safetensors files to the tensors that an index expects in each.

    Raises:
        ValueError: no such file, a missing shard, or an invalid index.
    """
    middle = f".{variant}" if variant else ""
    single = folder / f"{stem}{middle}.safetensors"
    if single.exists():
        return {single: frozenset()}
    index = folder / f"{stem}.safetensors.index{middle}.json"
    if index.exists():
        return _shards(index)
    found = sorted(p.name for p in folder.iterdir() if "json" not in p.suffix)
    raise UserError(
        f"{single} (or its index) is missing in {folder}; found {found}{_hint(folder, stem, found)}"
    )


def _hint(folder: epath.Path, stem: str, found: Sequence[str]) -> str:
    """Returns what to do where a folder holds other weight files than the ones asked for."""
    matches = (re.fullmatch(rf"{re.escape(stem)}\.(\w+)\.safetensors", name) for name in found)
    variants = [match[1] for match in matches if match]
    if f"{stem}.safetensors" in found:
        return "; leave model.variant unset: --config.model.variant="
    if variants:
        return f"; choose a variant with --config.model.variant={variants[0]}"
    if not any(name.endswith((".bin", ".ckpt", ".pt")) for name in found):
        return ""
    pipeline = folder.parent
    return (
        "; pickles (.bin, .ckpt) are never opened. If you trust them, convert them in PyTorch:\n"
        "  from diffusers import DiffusionPipeline\n"
        f"  DiffusionPipeline.from_pretrained({str(pipeline)!r}, use_safetensors=False)"
        f".save_pretrained({str(pipeline.with_name(pipeline.name + '-safetensors'))!r})"
    )


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
