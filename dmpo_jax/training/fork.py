"""Forks: a new run that goes on from another run's checkpoint with other settings.

The weights go along, and the optimizer's moments where the optimizer is the same. Step, schedule
and data begin at 0. The first state is the new run's checkpoint 0, so that from there a fork is
resumed like any run.
"""

import logging
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from dmpo_jax import storage
from dmpo_jax.errors import UserError
from dmpo_jax.training import optim
from dmpo_jax.training.build import TrainingStep
from dmpo_jax.training.checkpoint import Checkpoints, differences, has_checkpoints

LOG = logging.getLogger(__name__)
FORK = "fork.json"
# Sections of an identity that must be equal: they decide the shapes and the reference.
FIXED = ("model", "lora", "debug", "content")
FREE = ("model.compute_dtype", "model.vae", "lora.dropout")


def check(
    workdir: epath.Path | None,
    new: epath.Path,
    identity: Mapping[str, Any],
    places: Mapping[str, str] | None = None,
) -> bool:
    """Returns True if `new` has to be forked from `workdir`; False if that is done, or not asked.

    identity, places: of the new run, as `Checkpoints` takes them.

    Raises:
        UserError: `new` is no fork of `workdir`, or its identity has a model other than that of
            `workdir`; or no fork is asked for and one was begun in `new`.
    """
    if workdir is None:
        _check_finished(new)
        return False
    if storage.absolute(workdir) == storage.absolute(new):
        raise UserError(f"--fork must be another folder than --workdir, but got {new} for both")
    if has_checkpoints(new / "checkpoints"):
        made = storage.find_json(new / FORK)
        if not made or made["workdir"] != str(storage.absolute(workdir)):
            raise UserError(
                f"--fork={new} holds a run that is not a fork of {workdir}: choose a new folder"
            )
        return False
    path = workdir / "checkpoints" / "identity.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} has no checkpoint to fork from")
    theirs = storage.read_json(path)
    found = {
        key: values
        for key, values in differences(theirs, identity, places).items()
        if key.partition(".")[0] in FIXED and key not in FREE
    }
    if found:
        said = "\n  ".join(f"{key}: {a!r} there, {b!r} now" for key, (a, b) in found.items())
        raise UserError(
            f"a fork keeps the model of its run, but {workdir} has another:\n  {said}\n"
            "Change these back, or start a new run without --fork"
        )
    return True


def _check_finished(workdir: epath.Path) -> None:
    """Raises UserError if a fork was begun in `workdir` and not finished: it has no weights yet."""
    if (workdir / FORK).exists() and not has_checkpoints(workdir / "checkpoints"):
        came = storage.read_json(workdir / FORK)["workdir"]
        raise UserError(
            f"{workdir} is a fork that was not finished: run again with --workdir={came} "
            f"--fork={workdir}"
        )


def fork(
    built: TrainingStep,
    params: dict[str, Any],
    workdir: epath.Path,
    new: epath.Path,
    checkpoints: Checkpoints,
    *,
    optimizer: Mapping[str, Any],
    ema: bool,
    moving: bool,
) -> None:
    """Writes checkpoint 0 of the fork `new` and its record, from the newest one of `workdir`.

    Args:
        built: the new run's step. params: those that it would begin with; their arrays are
            replaced by shapes, since the checkpoint needs the memory.
        checkpoints: the new run's.
        optimizer: arguments of `optim.make_optimizer` in `workdir`.
        ema, moving: True if `workdir` keeps a moving average, a moving reference.
    """
    params.update({k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in params.items()})
    wanted = built.abstract_state(params)
    fields: dict[str, Any] = {"params": wanted.params}
    kept = optimizer["name"] == built.settings.optimizer["name"]
    if kept:  # the same leaves, under other names if only one of the two clips the gradient
        tx = optim.make_optimizer(lambda count: 0.0 * count, **optimizer)
        structure = jax.tree.structure(jax.eval_shape(tx.init, wanted.params))
        leaves = jax.tree.leaves(wanted.opt_state)
        fields["opt_state"] = jax.tree.unflatten(structure, leaves)
    for name, there in (("ema", ema), ("moving", moving)):
        if there and getattr(wanted, name) is not None:
            fields[name] = getattr(wanted, name)
    identity = storage.read_json(workdir / "checkpoints" / "identity.json")
    with Checkpoints(workdir / "checkpoints", keep=1, identity=identity, read_only=True) as source:
        step, found = source.restore_part(fields)
    state = built.make_state(dict(found["params"]))
    if kept:
        leaves = jax.tree.leaves(found["opt_state"])
        opt_state = jax.tree.unflatten(jax.tree.structure(wanted.opt_state), leaves)
        state = state._replace(opt_state=opt_state)
    beside = {name: found[name] for name in ("ema", "moving") if name in fields}
    state = state._replace(**beside)
    about = {
        "workdir": str(storage.absolute(workdir)),
        "step": step,
        "identity": storage.hash_json(identity),
    }
    if jax.process_index() == 0:
        storage.write_json(new / FORK, about)
    checkpoints.save(0, state)
    checkpoints.wait()
    moments = "with its optimizer's moments" if kept else "with a new optimizer"
    LOG.info("forked from step %d of %s, %s", step, workdir, moments)
