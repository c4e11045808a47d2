"""Save and restore a run's state, together, so that neither drifts from the other.

A checkpoint is one folder, `<folder>/<step>/`, that Orbax writes aside and commits in one
move: a process killed while saving leaves the checkpoints before it as they were. Beside
the arrays stands a list of every leaf's name, shape, dtype and checksum, because Orbax
notices a file that is cut or gone, but not a flipped bit in an array.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

_LOG = logging.getLogger(__name__)
# Not a sign of a broken file: the machine is too small, or the files are not ours to read.
_NOT_CORRUPTION = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
_NOT_SAVING = (MemoryError, jax.errors.JaxRuntimeError)  # of the arrays, not of the disk
_FULL = ("No space left", "Disk quota exceeded")


def _write_small_arrays_whole() -> None:
    """Orbax has every replica write a slice of every array: with thousands of small ones on
    eight devices that is six seconds a save, for nothing."""
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    level = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)  # it would warn of what is meant here
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    absl.logging.set_verbosity(level)


_write_small_arrays_whole()


class Checkpoints:
    """The checkpoints of one run. A context manager; leaving it waits for the last save.

    On many processes, every process makes one over the same folder and calls every method
    at the same step; files shared by all are written by process 0.

    Args:
        folder: where the checkpoints go, a local or an object-storage path.
        keep: how many of the newest to keep, at least 1; with 2 or more there is one to
            fall back on.
        identity: what must not change over a run (objective, model, data, seed, ...), as
            JSON can hold it. Written once, as `identity.json`.
        warn: is told, in one line, of a checkpoint that could not be read.
        read_only: leave the folder as it is, also what a run is just writing there.

    Raises:
        ValueError: if the folder belongs to a run of another identity, or is to be read and
            is not there.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep: int,
        identity: dict[str, Any],
        warn: Callable[[str], object] = _LOG.warning,
        read_only: bool = False,
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, but got {keep}")
        check_folder(folder)
        self._folder = epath.Path(folder)
        if "://" not in os.fspath(folder):  # of a URL it would make a folder of that name here
            self._folder = self._folder.absolute()
        self._warn = warn
        self._read_only, self._writing = read_only, False
        self._whole: set[int] = set()  # steps that this process wrote, or read and verified
        self._claim(json.loads(json.dumps(identity)))  # as it will read back: tuples are lists
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            cleanup_tmp_directories=not read_only,
            save_interval_steps=0 if read_only else 1,
            create=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        # Reads with a barrier for this process alone: where one of many cannot read its
        # part, the others must not wait in Orbax for it, but hear of it in _attempt.
        self._alone = alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process_{jax.process_index()}",
        )
        self._reader = ocp.Checkpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            multiprocessing_options=alone,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None or not issubclass(kind, Exception):
            self.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(SaveError):  # or it would take the first error's place
                self.close()
        # With many, what is being written waits for processes that may never come.

    def steps(self) -> list[int]:
        """The steps that have a committed checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, *, wait: bool = False) -> None:
        """Writes `state`, a pytree of arrays, as checkpoint `step`.

        Returns once the arrays are copied off the devices, so that they may be donated;
        writing goes on behind, and its failure is raised by the next call. A step that
        this object has already saved or restored is left as it is: a run is a pure
        function of (config, step).

        Args:
            step: how many updates `state` has seen; the checkpoint's name.
            state: what to save.
            wait: return only when the checkpoint is whole on disk.
        """
        if step not in self._whole:
            leaves = _describe(state)
            for leaf, checksum in zip(leaves.values(), _checksums(state), strict=True):
                leaf["checksum"] = checksum
            index = {"leaves": leaves, "digest": _digest(leaves)}
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state), index=ocp.args.JsonSave(index)
            )
            self._saving(lambda: self._manager.save(step, args=items, force=True))
            self._whole.add(step)
            self._writing = True
        if wait:
            self.wait()

    def check(self) -> None:
        """SaveError where writing has gone wrong by now; waits for nothing.

        Of many processes those that wrote their part wait for one that did not for as long as
        Orbax has them (600 s), and then raise too.
        """
        if self._writing and not self._manager.is_saving_in_progress():
            self._writing = False
            self.wait()

    def _saving(self, act: Callable[[], object]) -> None:
        try:
            act()
        except _NOT_SAVING:
            raise
        except Exception as error:  # Orbax and tensorstore: each has kinds of its own
            # tensorstore names every file it was in the middle of; what went wrong comes last.
            reason = re.sub(r"\s*\[\w+='[^\]]*\]", "", str(error).strip().rpartition('": ')[2])
            full = (
                any(x in str(error) for x in _FULL) or getattr(error, "errno", 0) in _FULL_NUMBERS
            )
            raise SaveError(
                f"a checkpoint could not be written to {self._folder} "
                f"({type(error).__name__}: {reason[-300:]}). "
                + ("The disk is full: make room, or keep fewer with log.keep. " if full else "")
                + f"The newest whole one is {max(self.steps(), default='none')}: run the same "
                "command again to go on from it"
            ) from error

    def restore(self, abstract: Any, *, step: int | None = None) -> tuple[int, Any] | None:
        """The newest whole checkpoint, or None where there is none at all.

        A checkpoint is whole if every file can be read and every array has the checksum
        it was saved with. Ones that are not are passed over; once a whole one is found
        they are renamed to `<step>.corrupt`, and `warn` names both.

        Args:
            abstract: the state's shapes, dtypes and shardings, as `jax.ShapeDtypeStruct`s
                (arrays will do). The shardings are those wanted now; the checkpoint may
                have been saved from another mesh or number of hosts.
            step: this one and no other.

        Returns:
            (step, state), the state sharded as `abstract` says.

        Raises:
            ValueError: if a checkpoint is readable and is of another state: names, shapes
                or dtypes differ; or if there is no checkpoint `step`.
            RuntimeError: if there are checkpoints and none is whole. Nothing is renamed
                then, so that the next start cannot take the folder for a new run's.
        """
        abstract = jax.tree.map(_abstract_leaf, abstract)
        self.wait()
        broken: dict[int, str] = {}
        steps = self.steps() if step is None else [step]
        if step is not None and step not in self.steps():
            raise ValueError(f"no checkpoint {step} in {self._folder}; there are {self.steps()}")
        for found in reversed(steps):
            try:
                state = self._read(found, abstract)
            except _Unreadable as error:
                broken[found] = str(error)
                continue
            for bad in broken:
                name = self._set_aside(bad)
                self._warn(
                    f"checkpoint {bad} is not whole ({broken[bad]}): it is now {name}, and "
                    f"the run goes on from checkpoint {found}"
                )
            self._whole.add(found)
            return found, state
        if broken:
            reasons = "; ".join(f"{bad}: {reason}" for bad, reason in broken.items())
            raise RuntimeError(
                f"no checkpoint in {self._folder} is whole ({reasons}). Put a good copy back, "
                "or choose another --workdir to start afresh"
            )
        return None

    def restore_part(
        self, abstract: dict[str, Any], *, step: int | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Some fields of a state, by name, verified; the others are not read.

        Where the newest checkpoint is not whole, the one before it, and `warn` names both.

        Args:
            abstract: field -> its shapes, dtypes and shardings, as for `restore`.
            step: this one and no other; None is the newest whole one.

        Raises:
            ValueError: there is no such checkpoint, or its fields are not these.
            RuntimeError: none asked for is whole. Nothing is set aside.
        """
        abstract = jax.tree.map(_abstract_leaf, abstract)
        self.wait()
        if not self.steps() or step not in [None, *self.steps()]:
            wanted = "checkpoint" if step is None else f"checkpoint {step}"
            raise ValueError(f"no {wanted} in {self._folder}; there are {self.steps()}")
        broken: dict[int, str] = {}
        for found in reversed(self.steps()) if step is None else [step]:
            try:
                part = self._read_part(found, abstract)
            except _Unreadable as error:
                broken[found] = str(error)
                continue
            for bad, reason in broken.items():
                self._warn(f"checkpoint {bad} is not whole ({reason}): this is checkpoint {found}")
            return found, part
        reasons = "; ".join(f"{bad}: {reason}" for bad, reason in broken.items())
        raise RuntimeError(
            f"no checkpoint asked for in {self._folder} is whole ({reasons}): choose another of "
            f"{self.steps()}"
        )

    def _read_part(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        # A state is a NamedTuple, whose leaves are named by attribute, a part is a dict.
        described = {}
        for field, tree in abstract.items():
            described |= {f".{field}{name}": leaf for name, leaf in _describe(tree).items()}
        leaves = self._attempt(lambda: self._read_index(step))
        held = {n: v for n, v in leaves.items() if n.startswith(tuple(f".{f}" for f in abstract))}
        _check_same(step, held, described)
        part = self._attempt(lambda: self._restore_part(step, abstract))
        checksums = [x for tree in part.values() for x in _checksums(tree)]
        for name, checksum in zip(described, checksums, strict=True):
            if leaves[name]["checksum"] != checksum:
                raise _Unreadable(f"the values of {name} are not those that were saved")
        return part

    def _restore_part(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=self._alone)
        reader = ocp.Checkpointer(handler, multiprocessing_options=self._alone)
        with contextlib.closing(reader):
            return reader.restore(self._folder / str(step) / "state", args=arguments)

    def wait(self) -> None:
        """Returns when nothing is being written; SaveError where that went wrong."""
        self._saving(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits, then lets go of Orbax's threads. The object is of no use afterwards."""
        self._saving(self._manager.close)
        self._reader.close()

    def _claim(self, identity: dict[str, Any]) -> None:
        """Writes the identity, or compares it with the one that is there."""
        path = self._folder / "identity.json"
        if self._read_only and not path.exists():
            raise ValueError(f"there are no checkpoints in {self._folder}")
        if jax.process_index() == 0 and not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            part = path.with_name("identity.json.part")
            part.write_text(json.dumps(identity, indent=2, sort_keys=True) + "\n")
            part.replace(path)  # a kill leaves no half-written identity to be compared with
        _barrier("identity")
        if not path.exists():
            raise ValueError(
                f"process {jax.process_index()} does not see {path}, which process 0 has written: "
                "--workdir must be a folder that all processes share"
            )
        ours, theirs = _flatten(identity), _flatten(json.loads(path.read_text()))
        missing = "(not set)"
        differing = [
            f"{key}: {theirs.get(key, missing)!r} there, {ours.get(key, missing)!r} now"
            for key in sorted(ours | theirs)
            if ours.get(key, missing) != theirs.get(key, missing)
        ]
        if differing:
            raise ValueError(
                f"{self._folder} holds the checkpoints of another run:\n  "
                + "\n  ".join(differing)
                + "\nChange these back to continue it, or choose another --workdir."
            )

    def _read(self, step: int, abstract: Any) -> Any:
        """One checkpoint, verified; raises _Unreadable on every process if on any."""
        leaves = self._attempt(lambda: self._read_index(step))
        _check_same(step, leaves, _describe(abstract))
        path, args = self._folder / str(step) / "state", ocp.args.StandardRestore(abstract)
        state = self._attempt(lambda: self._reader.restore(path, args=args))
        for (name, leaf), checksum in zip(leaves.items(), _checksums(state), strict=True):
            if leaf["checksum"] != checksum:
                raise _Unreadable(f"the values of {name} are not those that were saved")
        return state

    def _read_index(self, step: int) -> dict[str, dict]:
        index = ocp.JsonCheckpointHandler().restore(self._folder / str(step) / "index")
        if index["digest"] != _digest(index["leaves"]):
            raise _Unreadable("its list of leaves is damaged")
        return index["leaves"]

    def _attempt(self, read: Callable[[], Any]) -> Any:
        """Calls `read`; its failure on any process becomes _Unreadable on all."""
        value, reason = None, ""
        try:
            value = read()
        except _NOT_CORRUPTION:
            raise
        except Exception as error:  # Orbax, tensorstore, json: each has kinds of its own
            first_line = (str(error).splitlines() or [""])[0].partition(" See full")[0]
            reason = f"{type(error).__name__}: {first_line}"[:200]
        failed = bool(reason)
        if jax.process_count() > 1:
            failed = bool(multihost_utils.process_allgather(np.array(failed)).any())
        if failed:
            raise _Unreadable(reason or "another process could not read it")
        return value

    def _set_aside(self, step: int) -> str:
        """Renames a checkpoint that is not whole: its step can then be saved again."""
        name = f"{step}.corrupt"
        while (self._folder / name).exists():
            name += "-again"
        _barrier(f"aside {step}")  # all have chosen the name before it exists
        if jax.process_index() == 0:
            (self._folder / str(step)).rename(self._folder / name)
        _barrier(f"aside {step} done")
        self._manager.reload()
        return name


def check_folder(folder: epath.PathLike) -> None:
    """ValueError where Orbax can write no checkpoints: object storage other than Google's."""
    scheme, url, _ = os.fspath(folder).partition("://")
    if url and scheme != "gs":
        raise ValueError(
            f"checkpoints are written to local folders and gs://, but got {os.fspath(folder)}: "
            "choose such a --workdir, or mount the bucket as a folder. Encoded pairs may stay there"
        )


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


class _Unreadable(Exception):
    """A checkpoint is not whole; the message says why."""


def _abstract_leaf(x: Any) -> jax.ShapeDtypeStruct:
    if getattr(x, "sharding", None) is None:
        raise ValueError(f"restore needs a sharding on every leaf of the state, but got {x}")
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _describe(state: Any) -> dict[str, dict]:
    """{name: {"shape", "dtype"}} of every leaf, in the tree's own order."""
    return {
        jax.tree_util.keystr(path): {"shape": list(x.shape), "dtype": str(x.dtype)}
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def _check_same(step: int, saved: dict[str, dict], wanted: dict[str, dict]) -> None:
    """Raises ValueError where a checkpoint's leaves are not those the run has."""

    def shown(leaf):
        return f"{leaf['dtype']}{leaf['shape']}" if leaf else "nothing"

    differing = [
        f"{name}: the checkpoint has {shown(saved.get(name))}, the run {shown(wanted.get(name))}"
        for name in {**saved, **wanted}
        if any(
            saved.get(name, {}).get(k) != wanted.get(name, {}).get(k) for k in ("shape", "dtype")
        )
    ]
    if differing:
        more = f"\n  and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise ValueError(
            f"checkpoint {step} is whole, but does not match this run's state:\n  "
            + "\n  ".join(differing[:8])
            + f"{more}\nUse the model and optimizer it was saved with, or another --workdir."
        )


def _digest(leaves: dict[str, dict]) -> str:
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()


def _checksums(state: Any) -> list[int]:
    """One checksum a leaf, in the tree's order; the same under every sharding."""
    # One small program a distinct shape, where one over all leaves would take minutes to compile.
    return [int(x) for x in jax.device_get([_checksum(x) for x in jax.tree.leaves(state)])]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """A uint32 that any one changed element changes for certain.

    Computed where the array lies, so it costs a pass over memory and no copy. It is a sum,
    and integers wrap, so the order of adding (and with it the sharding) cannot matter.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width])
    bits = bits.astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index = index + iota * jnp.uint32(stride)
    return _mix(bits + _mix(index)).sum(dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A one-to-one scrambling of uint32s (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {dotted key: value}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = [_flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in tree.items()]
    return functools.reduce(lambda a, b: a | b, parts, {})


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoints: {name}")
