"""Saves and restores a run's complete state.

A checkpoint is one folder, `<folder>/<step>/`, that Orbax writes under a temporary name and
commits atomically: a process killed while saving leaves the earlier checkpoints intact. An
index lists every leaf's name, shape, dtype and checksum, because Orbax detects a truncated or
missing file, but not a flipped bit in an array.
"""

import contextlib
import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dmpo_jax import storage
from dmpo_jax.errors import UserError
from dmpo_jax.parallel import processes
from dmpo_jax.training import checksums
from dmpo_jax.training.orbax_handler import Failure, IndexHandler, StateHandler, array_registry

_LOG = logging.getLogger(__name__)
# These do not mean a corrupt file: memory is too small, or reading is not permitted.
_NOT_CORRUPTION = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
_NOT_SAVING = (MemoryError, jax.errors.JaxRuntimeError)  # errors of the arrays, not of the disk
_FULL = ("No space left", "Disk quota exceeded")


@contextlib.contextmanager
def _errors_alone() -> Iterator[None]:
    """Keeps libraries that log by absl, such as Orbax, from logging warnings."""
    before = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(before)


class Checkpoints:
    """The checkpoints of one run. A context manager; leaving it waits for the last save.

    With several processes, every process makes one over the same folder and calls every method
    at the same step. Process 0 writes the files that all share.

    Args:
        folder: where the checkpoints go, a local or an object-storage path.
        keep: number of newest checkpoints to keep, at least 1; with 2 or more there is one to
            fall back on.
        identity: settings that must match to resume (objective, model, data, seed, ...),
            JSON-serialisable. Written once, as `identity.json`.
        content: name -> hash of what the run was made from. Compared where both runs know it.
        places: setting of `identity` -> the content that it names, compared in its place.
        warn: receives one line for each checkpoint that could not be read.
        read_only: leaves the folder unchanged, even while a run writes to it.

    Raises:
        UserError: the folder belongs to a run of another identity, or is to be read and does
            not exist.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep: int,
        identity: dict[str, Any],
        content: Mapping[str, str] | None = None,
        places: Mapping[str, str] | None = None,
        warn: Callable[[str], object] = _LOG.warning,
        read_only: bool = False,
    ):
        if keep < 1:
            raise UserError(f"keep must be at least 1 checkpoint, but got {keep}")
        check_folder(folder)
        self._folder = storage.absolute(folder)
        self._warn = warn
        self._read_only, self._writing = read_only, False
        self._last = -1  # step of the last save that was started
        self._whole: set[int] = set()  # steps that this process wrote, or read and verified
        self._claim(identity | ({"content": content} if content else {}), places)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            cleanup_tmp_directories=not read_only,
            save_interval_steps=0 if read_only else 1,
            create=not read_only,
            read_only=read_only,
        )
        self._failure = Failure()
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        state = StateHandler(self._failure, type_handler_registry=array_registry())
        registry.add("state", ocp.args.PyTreeSave, state)
        registry.add("index", ocp.args.JsonSave, IndexHandler(self._failure))
        # Orbax warns of a folder that is opened read-only, as it is on purpose.
        with _errors_alone() if read_only else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(
                self._folder, options=options, handler_registry=registry
            )
        # Reads with a barrier for this process alone: if one process cannot read its part,
        # the others must not wait for it in Orbax; _attempt tells them.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process_{jax.process_index()}",
        )
        self._reader = ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(
                multiprocessing_options=alone, type_handler_registry=array_registry()
            ),
            multiprocessing_options=alone,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None or not issubclass(kind, Exception):
            self.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(SaveError):  # or it would replace the first error
                self.close()
        # With several processes, waiting for the write could block on processes that failed.

    def steps(self) -> list[int]:
        """Returns the steps that have a committed checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Writes `state`, a pytree of arrays, as checkpoint `step`.

        Returns once the arrays are copied off the devices, so that they may be donated. Writing
        continues in the background, and the next call raises its failure. A step that this object
        has already saved or restored is not written again: a run is a pure function of
        (config, step).

        Args:
            step: number of updates that `state` has seen; the checkpoint's name.
            state: the state to save.
        """
        if step in self._whole:
            return
        leaves = checksums.describe(state)
        for leaf, checksum in zip(leaves.values(), checksums.compute(state), strict=True):
            leaf["checksum"] = checksum
        index = checksums.make_index(leaves)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), index=ocp.args.JsonSave(index))
        self.wait()  # for the previous save
        self._last = step
        self._saving(lambda: self._manager.save(step, args=items, force=True))
        self._whole.add(step)
        self._writing = True

    def check(self) -> None:
        """Raises SaveError if a background write has failed by now; does not wait."""
        if self._writing and not self._is_writing():
            self._writing = False
            self.wait()

    def _saving(self, act: Callable[[], object]) -> None:
        try:
            act()
        except _NOT_SAVING:
            raise
        except Exception as error:  # Orbax and tensorstore raise many types
            # tensorstore lists every file that it was writing; the cause comes last.
            reason = re.sub(r"\s*\[\w+='[^\]]*\]", "", str(error).strip().rpartition('": ')[2])
            # Orbax lists the failed one until it has waited for the other processes.
            whole = [step for step in self.steps() if step != self._last]
            full = any(x in str(error) for x in _FULL)
            newest = (
                f"The newest valid one is {max(whole)}: the same command resumes from it"
                if whole
                else "There is no earlier one: the same command starts over"
            )
            raise SaveError(
                f"a checkpoint could not be written to {self._folder} "
                f"({type(error).__name__}: {reason[-300:]}). "
                + ("The disk is full: make room, or keep fewer with log.keep. " if full else "")
                + newest
            ) from error

    def restore(self, abstract: Any) -> tuple[int, Any] | None:
        """Restores the newest valid checkpoint; None if there are no checkpoints.

        A checkpoint is valid if every file can be read and every array has the checksum it was
        saved with. Once a valid one is found, newer invalid ones are renamed to `<step>.corrupt`,
        and `warn` names both.

        Args:
            abstract: the state's shapes, dtypes and shardings, as `jax.ShapeDtypeStruct`s or
                arrays. The shardings are those wanted now; the checkpoint may have been saved
                from another mesh or number of hosts.

        Returns:
            (step, state), the state sharded like `abstract`.

        Raises:
            UserError: a checkpoint is readable and is of another state: names, shapes or dtypes
                differ.
            UserError: there are checkpoints and none is valid. Nothing is renamed then, so that
                the next start does not mistake the folder for a new run's.
        """
        abstract = jax.tree.map(checksums.abstract_leaf, abstract)
        self.wait()
        broken: dict[int, str] = {}
        for found in reversed(self.steps()):
            try:
                state = self._read(found, abstract)
            except _Unreadable as error:
                broken[found] = str(error)
                continue
            for bad in broken:
                name = self._set_aside(bad)
                self._warn(
                    f"checkpoint {bad} is not valid ({broken[bad]}): it is now {name}, and "
                    f"the run resumes from checkpoint {found}"
                )
            self._whole.add(found)
            return found, state
        if broken:
            reasons = "; ".join(f"{bad}: {reason}" for bad, reason in broken.items())
            raise UserError(
                f"no checkpoint in {self._folder} is valid ({reasons}). Put a good copy back, "
                "or choose another --workdir to start afresh"
            )
        return None

    def restore_part(
        self, abstract: dict[str, Any], *, step: int | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Restores some fields of a state by name, verified; the others are not read.

        If the newest checkpoint is invalid, restores the one before it, and `warn` names both.

        Args:
            abstract: field -> its shapes, dtypes and shardings, as for `restore`.
            step: the only step to try; None is the newest valid one.

        Returns:
            (step, {field: values}).

        Raises:
            UserError: there is no such checkpoint, or its fields differ from these.
            UserError: no checkpoint that was tried is valid. Nothing is renamed.
        """
        abstract = jax.tree.map(checksums.abstract_leaf, abstract)
        self.wait()
        if not self.steps() or step not in [None, *self.steps()]:
            wanted = "checkpoint" if step is None else f"checkpoint {step}"
            raise UserError(f"no {wanted} in {self._folder}; there are {self.steps()}")
        broken: dict[int, str] = {}
        for found in reversed(self.steps()) if step is None else [step]:
            try:
                part = self._read(found, abstract, part=True)
            except _Unreadable as error:
                broken[found] = str(error)
                continue
            for bad, reason in broken.items():
                self._warn(f"checkpoint {bad} is not valid ({reason}): this is checkpoint {found}")
            return found, part
        reasons = "; ".join(f"{bad}: {reason}" for bad, reason in broken.items())
        raise UserError(
            f"no checkpoint asked for in {self._folder} is valid ({reasons}): choose another of "
            f"{self.steps()}"
        )

    def wait(self) -> None:
        """Waits for the background write to end; raises SaveError if it failed."""
        while self._is_writing():
            time.sleep(0.01)
        self._saving(self._finish)

    def _is_writing(self) -> bool:
        return self._failure.error is None and self._manager.is_saving_in_progress()

    def _finish(self) -> None:
        if self._failure.error is not None:
            raise self._failure.error
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends Orbax's threads. The object cannot be used afterwards."""
        self.wait()
        self._manager.close()
        self._reader.close()

    def _claim(self, identity: dict[str, Any], places: Mapping[str, str] | None) -> None:
        """Writes the identity, or compares it with that of the checkpoints that are there.

        A start that failed before its first checkpoint leaves nothing to protect.
        """
        path = self._folder / "identity.json"
        if self._read_only and not path.exists():
            raise UserError(f"there are no checkpoints in {self._folder}")
        empty = not self._read_only and not has_checkpoints(self._folder)
        if jax.process_index() == 0 and (empty or not path.exists()):
            self._folder.mkdir(parents=True, exist_ok=True)
            storage.write_json(path, identity, sort_keys=True)
        processes.barrier("identity")
        if not path.exists():
            raise UserError(
                f"process {jax.process_index()} does not see {path}, which process 0 has written: "
                "--workdir must be a folder that all processes share"
            )
        check_identity(self._folder, identity, places)

    def _read(self, step: int, abstract: Any, *, part: bool = False) -> Any:
        """Reads one checkpoint, or some of its fields, and verifies it.

        Raises:
            _Unreadable: on every process if on any.
        """
        described = checksums.describe(abstract)
        leaves = self._attempt(lambda: checksums.load_index(self._folder / str(step) / "index"))
        if part:
            leaves = {name: leaf for name, leaf in leaves.items() if name in described}
        checksums.check_same(step, leaves, described)
        path = self._folder / str(step) / "state"
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=part,
        )
        state = self._attempt(lambda: self._reader.restore(path, args=arguments))
        for name, checksum in zip(described, checksums.compute(state), strict=True):
            if leaves[name]["checksum"] != checksum:
                raise _Unreadable(f"the values of {name} are not those that were saved")
        return state

    def _attempt(self, read: Callable[[], Any]) -> Any:
        """Calls `read`; raises _Unreadable on all processes if it fails on any."""
        value, reason = None, ""
        try:
            value = read()
        except _NOT_CORRUPTION:
            raise
        except Exception as error:  # Orbax, tensorstore and json raise many types
            first_line = (str(error).splitlines() or [""])[0].partition(" See full")[0]
            reason = f"{type(error).__name__}: {first_line}"[:200]
        failed = bool(reason)
        if jax.process_count() > 1:
            failed = bool(multihost_utils.process_allgather(np.array(failed)).any())
        if failed:
            raise _Unreadable(reason or "another process could not read it")
        return value

    def _set_aside(self, step: int) -> str:
        """Renames an invalid checkpoint: its step can then be saved again."""
        name = f"{step}.corrupt"
        while (self._folder / name).exists():
            name += "-again"
        processes.barrier(f"aside {step}")  # all processes choose the name before it exists
        if jax.process_index() == 0:
            (self._folder / str(step)).rename(self._folder / name)
        processes.barrier(f"aside {step} done")
        self._manager.reload()
        return name


def has_checkpoints(folder: epath.PathLike) -> bool:
    """True if a folder holds a committed checkpoint, valid or set aside as corrupt."""
    folder = epath.Path(folder)
    return folder.exists() and any(
        re.fullmatch(r"\d+(\.corrupt.*)?", path.name) for path in folder.iterdir()
    )


def check_folder(folder: epath.PathLike) -> None:
    """Raises ValueError if Orbax cannot write there: object storage other than Google's."""
    scheme, url, _ = os.fspath(folder).partition("://")
    if url and scheme != "gs":
        raise UserError(
            f"checkpoints are written to local folders and gs://, but got {os.fspath(folder)}: "
            "choose such a --workdir, or mount the bucket as a folder. Encoded pairs may stay there"
        )


class SaveError(UserError):
    """A checkpoint could not be written; earlier ones are intact."""


class _Unreadable(Exception):
    """A checkpoint is invalid; the message says why."""


def check_identity(
    folder: epath.PathLike, identity: Any, places: Mapping[str, str] | None = None
) -> None:
    """Raises UserError if a folder's checkpoints are of a run with another identity.

    places: as of `Checkpoints`.
    """
    path = epath.Path(folder) / "identity.json"
    if not (path.exists() and has_checkpoints(folder)):
        return
    found = differences(storage.read_json(path), identity, places)
    differing = [f"{key}: {theirs!r} there, {ours!r} now" for key, (theirs, ours) in found.items()]
    if differing:
        raise UserError(
            f"{folder} holds the checkpoints of another run:\n  "
            + "\n  ".join(differing)
            + "\nChange these back to continue it, choose another --workdir, or go on from it with "
            "other settings by --fork=NEW_WORKDIR."
        )


def differences(
    theirs: Any, ours: Any, places: Mapping[str, str] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Returns {dotted key: (their value, our value)} of what two identities differ in.

    Content counts where both know it. `places` that name content count only if theirs is unknown.
    """
    theirs, ours = (_flatten(json.loads(json.dumps(x))) for x in (theirs, ours))  # tuples: lists
    content = {key for key in ours | theirs if key.startswith("content.")}
    known = {key for key in content if key in ours and key in theirs}
    ignored = content - known
    ignored |= {path for path, x in (places or {}).items() if f"content.{x}" in theirs}
    missing = "(not set)"
    keys = sorted((ours | theirs).keys() - ignored)
    pairs = {key: (theirs.get(key, missing), ours.get(key, missing)) for key in keys}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to {dotted key: value}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = [_flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in tree.items()]
    return functools.reduce(lambda a, b: a | b, parts, {})
