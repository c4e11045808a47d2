"""A compiled training step in a file, so that a run starts without compiling."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from dmpo_jax.config import leaves as configs

LOG = logging.getLogger(__name__)
FORMAT = "dmpo_jax compiled step 1"
# The parts of a config that reach the program.
_SECTIONS = ("objective", "objectives", "safeguard", "timesteps", "lora", "optimizer", "mesh")
_LEAVES = (
    "model.compute_dtype",
    "model.attention",
    "model.remat",
    "model.scan",
    "train.batch_size",
    "train.accumulation",
    "train.ema_decay",
)


@contextlib.contextmanager
def never_cached() -> Iterator[None]:
    """Compiles past the compilation cache: on a CPU, a program that was read from there and is
    saved once more lacks functions when it is loaded."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks whether there is one but once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def identity(config: configs.Config, setup: Any, arguments: Any, devices: Any) -> dict[str, Any]:
    """Everything that a compiled step depends on, as JSON can hold it.

    Args:
        setup: the step's. arguments: state, reference, batch, key: arrays or shapes with
            shardings. devices: the mesh.
    """
    table = hashlib.sha256(setup.schedule.alphas_cumprod.tobytes()).hexdigest()[:16]
    leaves = jax.tree_util.tree_leaves_with_path(arguments)
    shapes = [
        f"{jax.tree_util.keystr(path)} {x.dtype}{list(x.shape)} {getattr(x.sharding, 'spec', '')}"
        for path, x in leaves
    ]
    return {
        "versions": versions(),
        "config": program_leaves(config),
        "devices": {
            "kind": devices.devices.flat[0].device_kind,
            "mesh": {axis: int(size) for axis, size in devices.shape.items()},
            "order": [int(device.id) for device in devices.devices.flat],
        },
        "model": {
            "arguments": hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16],
            "schedule": f"{setup.schedule.prediction_type} {table}",
            "scaling": [setup.scaling_factor, setup.shift_factor],
            "mean_only": setup.mean_only,
        },
    }


def program_leaves(config: configs.Config) -> dict[str, Any]:
    """The leaves of a config that change the compiled step."""
    flat = configs.flatten(config)
    kept = {}
    for path, value in flat.items():
        if path.startswith("objectives.") and not path.startswith(f"objectives.{config.objective}"):
            continue
        if path.split(".")[0] in _SECTIONS or path in _LEAVES:
            kept[path] = list(value) if isinstance(value, tuple) else value
    if config.optimizer.schedule != "constant":
        kept["train.steps"] = config.train.steps
    return kept


def versions() -> dict[str, str]:
    """Of what compiles, and a hash of this package's source."""
    found = {"source": source_hash()}
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def source_hash() -> str:
    """Of every Python file of the package: a plan or a compiled step is of one source only."""
    root, digest = pathlib.Path(configs.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def save(path: epath.PathLike, compiled: Any, identified: dict[str, Any]) -> None:
    """Writes a compiled step. What it returns beside the state is named in the file."""
    payload, _, out_tree = serialize_executable.serialize(compiled)
    _, metrics = jax.tree.unflatten(out_tree, range(out_tree.num_leaves))
    head = {"format": FORMAT, "metrics": sorted(metrics), **identified}
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(head).encode() + b"\n" + payload)
    LOG.info("the compiled step is in %s (%.0f MB)", path, len(payload) / 1e6)


def load(path: epath.PathLike, identified: dict[str, Any], arguments: tuple[Any, ...]) -> Any:
    """The step that `save` wrote, to be called with (state, reference, batch, key).

    Loading runs what the file holds: take it from where you take code from.

    Raises:
        ValueError: it is no such file, or was compiled for something else, naming each
            difference; what to do about it.
    """
    path = epath.Path(path)
    if not path.exists():
        raise ValueError(f"train.compiled: there is no {path}: make it with launch/plan.py --save")
    head, _, payload = path.read_bytes().partition(b"\n")
    try:
        stated = json.loads(head)
        metrics = stated.pop("metrics")
        known = stated.pop("format") == FORMAT
    except (ValueError, KeyError, AttributeError, TypeError):
        known = False
    if not known:
        raise ValueError(f"train.compiled: {path} is no compiled step of this version's format")
    if differences := list(_differences(stated, json.loads(json.dumps(identified)))):
        raise ValueError(
            f"train.compiled: {path} was compiled for another run; it has "
            + "; ".join(differences)
            + ". Make it again with launch/plan.py --save, or leave train.compiled empty"
        )
    in_tree = jax.tree.structure((arguments, {}))
    out_tree = jax.tree.structure((arguments[0], dict.fromkeys(metrics, 0)))
    return serialize_executable.deserialize_and_load(payload, in_tree, out_tree)


def _differences(stated: Any, wanted: Any, path: str = ""):
    """'PATH A where this run has B' for each leaf that differs."""
    if isinstance(stated, dict) and isinstance(wanted, dict):
        for key in sorted(stated.keys() | wanted.keys()):
            inner = f"{path}.{key}" if path else key
            yield from _differences(stated.get(key), wanted.get(key), inner)
    elif stated != wanted:
        yield f"{path} {stated!r} where this run has {wanted!r}"
