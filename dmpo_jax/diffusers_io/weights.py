"""Loads and saves one model of a PyTorch pipeline; one converter serves every model.

Attribute paths are PyTorch's names, so conversion is `layout`'s four rules. Only safetensors
are opened, never a pickle. A model passes through the host one tensor at a time, both ways.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Sharding

from dmpo_jax import storage
from dmpo_jax.diffusers_io import folders, placement, tensor_files
from dmpo_jax.diffusers_io.folders import one_line, some
from dmpo_jax.diffusers_io.layout import (
    BUFFERS,
    LEGACY,
    Bounds,
    permuted,
    to_jax,
    to_torch,
    torch_name,
)
from dmpo_jax.errors import UserError
from dmpo_jax.models import parameters
from dmpo_jax.parallel import processes

SHARD_BYTES = 5 * 2**30

Shapes = dict[str, jax.ShapeDtypeStruct]
Files = Mapping[str, tensor_files.TensorFile]


# --- reading -----------------------------------------------------------------


class Match(NamedTuple):
    """Location of each parameter in the files.

    legacy: rules that its names follow. pointwise: paths of linear layers that are stored as
    1x1 convolutions.
    """

    names: dict[str, str]  # path -> name in the file
    legacy: tuple[str, ...]
    pointwise: tuple[str, ...]


def load_weights(
    make: Callable[..., Any],
    folder: epath.Path,
    *,
    stem: str,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any | Callable[[str], Any] = jnp.float32,
    sharding: Callable[[Shapes], Mapping[str, Sharding]] | None = None,
    held: Callable[[str, jax.Array], Any] | None = None,
    abstract: bool = False,
    config: Mapping[str, Any] | None = None,
    renamed: Callable[[Files], Files] | None = None,
) -> Any:
    """Builds `make(config, ...)` and fills it from the folder's safetensors.

    Args:
        variant: `fp16` reads `*.fp16.safetensors`.
        dtype: compute dtype.
        param_dtype: dtype of the parameters: one dtype, or path -> dtype.
        sharding: shapes by path -> shardings by path, as `mesh.parameter_sharding` with its
            mesh bound; each process reads its devices' shards. None: the default device.
        held: (path, array of `param_dtype`) -> what the model holds instead, such as
            `quantised.Holding.placed`; applied as each tensor is read. `save_weights` cannot save
            it. None: the array.
        abstract: reads no parameter: the model holds ShapeDtypeStructs, its buffers, and the
            attributes that `save_weights` needs besides `params`.
        config: in place of the folder's config.json.
        renamed: gives the tensors of another library's file the names that the model expects.

    Raises:
        ValueError: in one line, before any tensor is read: an unsupported config value; a
            file that cannot be read; tensors that are missing, unexpected or misshapen.
    """
    config = folders.read_json(folder / "config.json") if config is None else config
    one_dtype = jnp.float32 if _chooses(param_dtype) else param_dtype
    try:
        model = parameters.abstract(make, config, dtype=dtype, param_dtype=one_dtype)
    except Exception as error:  # the config is the only external input
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(
            f"{folder / 'config.json'} describes no model: {kind}{one_line(error)}"
        ) from error
    wanted = parameters.shapes(model)
    if _chooses(param_dtype):
        wanted = {
            path: jax.ShapeDtypeStruct(spec.shape, param_dtype(path))
            for path, spec in wanted.items()
        }
    with tensor_files.opened(folders.weight_files(folder, stem, variant)) as files:
        files = files if renamed is None else renamed(files)
        unused = getattr(model, "unused", lambda name: False)
        stored = {name: file.names[name] for name, file in files.items()}
        match = _match(folder, stored, wanted, unused)
        chosen = parameters.buffer_paths(model) if abstract else wanted.keys()
        arrays = {**wanted, **_read(files, match, wanted, chosen, sharding, held)}
    structure, _ = nnx.split(model)
    model = parameters.merge(structure, arrays)
    model.layout, model.pointwise = match.legacy, match.pointwise
    return model


def _chooses(param_dtype: Any) -> bool:
    """True if it is path -> dtype. Dtypes like `jnp.float32` are callable too."""
    try:
        jnp.dtype(param_dtype)
    except TypeError:
        return callable(param_dtype)
    return False


def _match(
    folder: epath.Path,
    stored: Mapping[str, tuple[int, ...]],
    wanted: Shapes,
    unused: Callable[[str], bool],
) -> Match:
    """Matches the parameters to the tensors of these names and shapes; UserError lists differences.

    unused: name -> true if the model does not need the tensor.
    """
    paths = {torch_name(path): path for path in wanted}
    rules = [rule for rule in LEGACY if rule.applies(set(stored))]
    names, pointwise, unexpected, misshapen = {}, [], [], []
    for stored_name, shape in stored.items():
        name = stored_name
        for rule in rules:
            name = rule.load(name)
        if name.endswith(BUFFERS) or unused(name):
            continue
        if name not in paths:
            unexpected.append(name)
            continue
        path = paths[name]
        names[path] = stored_name
        expected = permuted(path, wanted[path].shape)
        if shape == (*expected, 1, 1) and len(expected) == 2:
            pointwise.append(path)
        elif shape != expected:
            misshapen.append(f"{name} has {shape}, config.json says {expected}")
    missing = sorted(name for name, path in paths.items() if path not in names)
    wrong = {"missing": missing, "unexpected": sorted(unexpected), "misshapen": sorted(misshapen)}
    if any(wrong.values()):
        found = "; ".join(f"{len(n)} {what}: {some(n)}" for what, n in wrong.items() if n)
        raise UserError(
            f"weights in {folder} do not fit its config.json: {found}. "
            "Is it complete, and are both of one model?"
        )
    return Match(names, tuple(rule.name for rule in rules), tuple(pointwise))


def _read(
    files: Files,
    match: Match,
    wanted: Shapes,
    chosen: Collection[str],
    sharding: Callable[[Shapes], Mapping[str, Sharding]] | None,
    held: Callable[[str, jax.Array], Any] | None,
) -> parameters.Params:
    """Reads the chosen parameters, in the order of the files, one tensor at a time."""
    shardings = {} if sharding is None else sharding(wanted)
    places = {name: path for path, name in match.names.items() if path in chosen}
    params: parameters.Params = {}
    last = None
    for name, file in files.items():
        if last is not None and last is not file:
            last.release()  # one file at a time is mapped
        last = file
        if name not in places:
            continue
        path = places[name]
        spec, pointwise = wanted[path], path in match.pointwise
        read = functools.partial(_read_part, file, name, path, spec.dtype, pointwise)
        array = placement.place(spec.shape, shardings.get(path), read)
        kept = array if held is None else held(path, array)
        # Transfers are asynchronous and hold their source: unbounded, all sources would be held.
        params[path] = jax.block_until_ready(kept)
    return params


def _read_part(
    file: tensor_files.TensorFile, name: str, path: str, dtype: Any, pointwise: bool, bounds: Bounds
) -> np.ndarray:
    """Reads the part of a parameter that lies within bounds of its own axes."""
    stored = permuted(path, bounds) + (((0, 1), (0, 1)) if pointwise else ())
    tensor = file.read(name, stored)
    tensor = to_jax(path, tensor[:, :, 0, 0] if pointwise else tensor)
    array = np.ascontiguousarray(tensor, dtype)
    if not _is_finite(array):
        raise UserError(
            f"{file.file} holds values in {name} that are not finite as {array.dtype}: "
            "copy the file again, or take another variant or dtype"
        )
    return array


def _is_finite(array: np.ndarray) -> bool:
    """True if every value is a finite number. A sum shows it in one pass, but for overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=np.float32)
    return bool(np.isfinite(total)) or bool(np.isfinite(array).all())


# --- writing -----------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor in a folder: our path, and its stored shape and dtype."""

    path: str
    spec: jax.ShapeDtypeStruct


def _stored(model: Any, arrays: Mapping[str, Any], dtype: Any) -> dict[str, Stored]:
    """Returns tensors by name, sorted, under the names of the model's folder."""
    rules = [rule for rule in LEGACY if rule.name in getattr(model, "layout", ())]
    found = {}
    for path, array in arrays.items():
        name = torch_name(path)
        for rule in rules:
            name = rule.save(name)
        shape = permuted(path, array.shape)
        if path in getattr(model, "pointwise", ()):
            shape = (*shape, 1, 1)
        spec = jax.ShapeDtypeStruct(shape, array.dtype if dtype is None else dtype)
        found[name] = Stored(path, spec)
    return dict(sorted(found.items()))


def _converted(stored: Stored, array: np.ndarray) -> np.ndarray:
    tensor = to_torch(stored.path, array).reshape(stored.spec.shape)
    return np.ascontiguousarray(tensor, stored.spec.dtype)


def state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the model on the host in PyTorch's layouts, under the names of its folder.

    On several processes, each must call it.
    """
    arrays = parameters.split(model)[1]
    found = _stored(model, arrays, None)
    return {n: _converted(s, placement.gather(arrays[s.path])) for n, s in found.items()}


def save_weights(
    model: Any,
    folder: epath.PathLike,
    *,
    stem: str,
    params: Mapping[str, Any] | None = None,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors, sharded above `shard_bytes`.

    Every process must call it. Tensors are gathered one after another; process 0 converts
    each and streams it into its file; a barrier follows. config.json is the commit marker: it
    is removed before the weights change and written last, so a killed save never leaves a
    folder that looks complete.

    Args:
        params: saved in place of the model's own, which may then be abstract; on any mesh.
            Buffers that they lack are the model's.
        dtype: None keeps that of the parameters.

    Raises:
        ValueError: `params` are not this model's.
    """
    own = parameters.split(model)[1]
    if params is not None:
        own = parameters.completed(params, parameters.partition(model, own)[1])
    arrays = own
    _check_same(model, arrays)
    shards = _cut(_stored(model, arrays, dtype), shard_bytes)
    count = len(shards)
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    folder, writes = epath.Path(folder), jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"*{storage.PART}"):  # of a killed save
            stale.unlink()
    for name, shard in zip(names, shards, strict=True):

        def produce(tensor: str, shard=shard) -> np.ndarray | None:
            array = arrays[shard[tensor].path]
            if not (writes or placement.takes_all(array)):
                return None
            gathered = placement.gather(array)
            return _converted(shard[tensor], gathered) if writes else None

        part = storage.temporary(folder / name) if writes else None
        with storage.naming(folder / name):
            tensor_files.write(part, {n: stored.spec for n, stored in shard.items()}, produce)
    if writes:
        _commit(model, folder, stem, dict(zip(names, shards, strict=True)))
    processes.barrier(f"saved {folder}")


def _check_same(model: Any, arrays: Mapping[str, Any]) -> None:
    wanted = parameters.shapes(model)
    wrong = sorted(wanted.keys() ^ arrays.keys())
    wrong += [k for k in wanted.keys() & arrays.keys() if wanted[k].shape != arrays[k].shape]
    if wrong:
        raise UserError(
            f"params must have the paths and shapes of the {type(model).__name__}, but "
            f"{len(wrong)} differ: {some(wrong)}; save them with the model they were made for"
        )


def _cut(stored: dict[str, Stored], shard_bytes: int) -> list[dict[str, Stored]]:
    """Splits tensors into shards: a tensor that would exceed the limit starts a new one."""
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for name, tensor in stored.items():
        size += tensor_files.nbytes(tensor.spec)
        if shards[-1] and size > shard_bytes:
            shards.append({})
            size = tensor_files.nbytes(tensor.spec)
        shards[-1][name] = tensor
    return shards


def _commit(
    model: Any, folder: epath.Path, stem: str, shards: Mapping[str, Mapping[str, Stored]]
) -> None:
    """Replaces the folder's previous weights and config by the written parts."""
    (folder / "config.json").unlink(missing_ok=True)
    for stale in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        stale.unlink()
    for name in shards:
        storage.temporary(folder / name).replace(folder / name)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in shards.items() for key in shard}
        size = sum(tensor_files.nbytes(t.spec) for shard in shards.values() for t in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        storage.write_json(folder / f"{stem}.safetensors.index.json", index)
    storage.write_json(folder / "config.json", model.config.given)
