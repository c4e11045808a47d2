"""Reads the start of a run and its reference, where these are not the pipeline's own model."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dmpo_jax.diffusers_io.folders import some
from dmpo_jax.diffusers_io.starts import Start
from dmpo_jax.errors import UserError
from dmpo_jax.models import lora, parameters
from dmpo_jax.models.lora import Adapters
from dmpo_jax.training.build import Beginning


def check_beginning(start: Start, reference: Start, adapters: Adapters | None) -> None:
    """Raises UserError unless start and reference fit the model, each other and the adapters.

    Reads no weights but those of LoRA files. Arguments as of `read_beginning`.
    """
    if not start.name and reference is start:
        return  # the model itself, which training checks
    model = start.load(abstract=True, merge=adapters is None)
    if adapters is not None:
        _of_adapters(start, reference, adapters, model)
    elif reference is not start:
        reference.load(abstract=True)


def read_beginning(
    start: Start,
    reference: Start,
    adapters: Adapters | None,
    model: Any,
    load: Callable[[Start], Any],
) -> Beginning:
    """Reads what `build` takes besides the model.

    Args:
        start: the weights that training starts from. With adapters a LoRA file is their first
            value; without, it is part of `model` by now.
        reference: the weights that margins are measured against, frozen; `start` by default. The
            same content costs no second copy.
        adapters: those that are trained; None if every parameter is.
        model: loaded from `start`, or its shapes.
        load: loads the model of a start, sharded, in the dtype of frozen parameters.

    Raises:
        UserError: adapters of another rank or of other layers than those that are trained; a
            reference beside adapters that is another complete model.
    """
    if adapters is not None:
        return _of_adapters(start, reference, adapters, model)
    if reference is start or reference.digest() == start.digest():
        return Beginning()
    other = load(reference)
    params, buffers = parameters.partition(other, parameters.split(other)[1])
    _check_buffers(reference, buffers, parameters.partition(model, parameters.split(model)[1])[1])
    return Beginning(reference=params)


def _of_adapters(start: Start, reference: Start, adapters: Adapters, model: Any) -> Beginning:
    """Returns the beginning of a run that trains adapters."""
    first = _fitted(start, adapters, model) if start.lora else None
    if reference is start or reference.digest() == start.digest():
        return Beginning(first)
    named = f"--config.{reference.option}={reference.name}"
    if reference.lora is not None and start.folder is None:
        return Beginning(first, _fitted(reference, adapters, model))
    if reference.lora is not None:
        raise UserError(
            f"{named} is a LoRA file on {reference.own}, but the adapters are trained on "
            f"--config.{start.option}={start.name}: leave {reference.option} unset, or merge the "
            "file into a folder"
        )
    base = start._replace(lora=None)
    if reference.digest() == base.digest():
        return Beginning(first, {})
    raise UserError(
        f"{named} is another complete model than {base.weights[0]}, on which the adapters are "
        f"trained, and would be held beside it: leave {reference.option} unset, give a LoRA file, "
        "or train every parameter (lora.rank=0)"
    )


def _fitted(start: Start, adapters: Adapters, model: Any) -> dict[str, np.ndarray]:
    """Returns the adapters of a LoRA file under the scale of those that are trained.

    Raises:
        UserError: their rank or their layers are others than those that are trained.
    """
    found = start.adapters(model)
    shapes = parameters.shapes(model)
    start.check_layers(found, shapes)
    named = f"--config.{start.option}={start.name}"
    if any(path.endswith(lora.MAGNITUDE) for path in found):
        raise UserError(
            f"{named} is a DoRA file; adapters that are trained are plain LoRA: merge the file "
            "into a folder with the program that made it, and name that"
        )
    ranks = sorted({x.shape[-1] for path, x in found.items() if ".lora_A." in path})
    if ranks != [adapters.rank]:
        hint = (
            f"set --config.lora.rank={ranks[0]}"
            if len(ranks) == 1
            else "merge the file into a folder"
        )
        raise UserError(
            f"{named} holds adapters of rank {' and '.join(map(str, ranks))}, but "
            f"lora.rank={adapters.rank} is trained: {hint}"
        )
    attached = adapters.attach(parameters.without_arrays(model))
    wanted = lora.partition(parameters.shapes(attached))[1]
    layers = sorted({path.partition(".lora_")[0] for path in wanted})
    theirs = sorted({path.partition(".lora_")[0] for path in found})
    if layers != theirs:
        more, less = sorted({*theirs} - {*layers}), sorted({*layers} - {*theirs})
        said = [f"adapts {some(more)}, which lora.targets does not name"] * bool(more)
        said += [f"does not adapt {some(less)}, which lora.targets names"] * bool(less)
        ends = ",".join(sorted({lora.last_parts(layer) for layer in theirs}))
        raise UserError(f"{named} {' and '.join(said)}: set --config.lora.targets={ends}")
    # Their scale is in B; the model multiplies by its own.
    factor = np.float32(adapters.scale)
    return {path: x / factor if ".lora_B." in path else x for path, x in found.items()}


def _check_buffers(reference: Start, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises UserError if the reference has other buffers: both models compute with one set."""
    differing = [
        path
        for path, x in theirs.items()
        if not bool(jnp.array_equal(x, ours[path].astype(x.dtype)))
    ]
    if differing:
        raise UserError(
            f"--config.{reference.option}={reference.name} holds other numbers in "
            f"{some(sorted(differing))}, which are not trained, than the start: take a reference "
            "of the same model"
        )
