"""A training checkpoint -> a diffusers pipeline folder."""

import functools

import jax
from etils import epath

from dmpo_jax import checkpoint, diffusers_io, mesh, step
from dmpo_jax import config as configs
from dmpo_jax.jobs.train import export, make_optimizer
from dmpo_jax.models import parameters


def convert(*, workdir: epath.PathLike, out: epath.PathLike, at: int | None = None) -> None:
    """Writes the pipeline that `workdir` trains, with the UNet of its checkpoint.

    Args:
        workdir: a run's folder, with config.json and checkpoints/.
        at: which step; None is the newest whole one.

    Raises:
        ValueError: no such run or checkpoint, naming the steps there are.
    """
    workdir = epath.Path(workdir)
    config = configs.from_leaves(diffusers_io.read_json(workdir / "config.json"))
    unet = diffusers_io.load_unet(config.model.folder, variant=config.model.variant or None)
    _, params = parameters.split(unet)
    _, tx = make_optimizer(config)
    shapes = jax.eval_shape(functools.partial(step.make_state, tx=tx), params)
    everywhere = mesh.replicated(mesh.make_mesh())
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
    )
    identity = configs.identity(config)
    with checkpoint.Checkpoints(
        workdir / "checkpoints", keep=config.log.keep, identity=identity
    ) as checkpoints:
        restored = checkpoints.restore(wanted, step=at)
    if restored is None:
        raise ValueError(f"{workdir} holds no checkpoint yet")
    export(unet, restored[1].params, config.model.folder, epath.Path(out))
