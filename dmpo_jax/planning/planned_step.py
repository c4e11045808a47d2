"""The step that a config trains with, in shapes alone: no weights, no data, any devices."""

import functools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config import leaves as configs
from dmpo_jax.data.batches import batches as pipeline
from dmpo_jax.data.encoded import folder as records
from dmpo_jax.diffusion import noise as noising
from dmpo_jax.families import PUBLISHED, Family, family_named
from dmpo_jax.jobs import train
from dmpo_jax.jobs.convert import adapt
from dmpo_jax.models import lora, parameters
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.parallel import mesh
from dmpo_jax.planning import flops
from dmpo_jax.toy import make as make_digits
from dmpo_jax.toy import tiny as debug
from dmpo_jax.training import step

LOG = logging.getLogger(__name__)
TOKENS = 77  # of a prompt, in every published model


class Model(NamedTuple):
    """What a plan needs of a pipeline.

    unet: what unet/config.json holds. meta: what encoded pairs for it say of themselves.
    """

    name: str
    family: Family
    unet: Mapping[str, Any]
    schedule: noising.NoiseTable
    meta: Mapping[str, Any]


class Planned(NamedTuple):
    """A step to compile, and what its arguments are made of."""

    update: Any  # jitted
    setup: step.Setup
    arguments: tuple[Any, ...]  # state, reference, batch, key: shapes with shardings
    devices: jax.sharding.Mesh
    model: Model
    pair_flops: int


def load_model(config: configs.Config, published: str = "") -> Model:
    """The model that a config names, or a published one's shapes.

    Args:
        published: a name in `PUBLISHED`; "" takes debug.family or model.folder.

    Raises:
        ValueError: the folder is not there: a hub id is not downloaded for its shapes.
    """
    if published:
        one = PUBLISHED[published]
        schedule = noising.make_ddpm_table(**one.scheduler)
        meta = make_meta(config, one.model, one.family, {"scaling_factor": one.scaling_factor})
        return Model(published, one.family, one.model, schedule, meta)
    if config.debug.family:
        family = family_named(config.debug.family)
        unet = debug.model_config(family)
        given = {k: v for k, v in make_digits.SCHEDULER.items() if k in _SCHEDULE}
        meta = make_meta(config, unet, family, {"scaling_factor": 1.0}, make_digits.TOKENS)
        schedule = noising.make_ddpm_table(**given)
        return Model(f"debug {config.debug.family}", family, unet, schedule, meta)
    folder = epath.Path(config.model.folder)
    if not (folder / "unet" / "config.json").exists():
        raise ValueError(
            f"a plan reads unet/config.json, and {config.model.folder!r} is no folder that holds "
            f"one (a hub id is not downloaded): give --model={'|'.join(PUBLISHED)}, or a folder"
        )
    folder, family = diffusers_io.load_family(folder)
    unet = diffusers_io.read_json(folder / "unet" / "config.json")
    schedule, _ = diffusers_io.load_schedule(folder)
    vae = diffusers_io.read_json(folder / "vae" / "config.json")
    return Model(str(folder), family, unet, schedule, _read_meta(config, unet, family, vae))


_SCHEDULE = ("beta_start", "beta_end", "beta_schedule", "prediction_type")


def _read_meta(config: configs.Config, unet: Mapping[str, Any], family: Any, vae: Mapping):
    """Of the encoded pairs, where the config names them: a saved step must fit them exactly."""
    if config.data.encoded:
        return records.load_meta(config.data.encoded)
    LOG.info("data.encoded is not set: the pairs are taken to be as encode would make them")
    return make_meta(config, unet, family, vae)


def make_meta(
    config: configs.Config,
    unet: Mapping[str, Any],
    family: Family,
    vae: Mapping[str, Any],
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """What encode would say of pairs for this model at the config's resolution."""
    facts = family.facts(unet)
    fits = (n for n in range(1, facts.in_channels + 1) if _takes(family, n) == facts.in_channels)
    latent = next(fits)
    side = facts.latent_size[0] if facts.latent_size else 64
    if config.data.resolution:
        side = config.data.resolution // 8
    moments = latent * (1 if config.data.moments == "mean" else 2)
    stored = config.data.moments_dtype

    def described(*shape: int, dtype: str = "float16") -> dict[str, Any]:
        return {"shape": list(shape), "dtype": dtype}

    pooled = described(facts.pooled_width) if facts.pooled_width else None
    image = family.given.width(latent) if family.given else 0
    return {
        "scaling_factor": float(vae.get("scaling_factor", 0.18215)),
        "shift_factor": float(vae.get("shift_factor") or 0.0),
        "moments": config.data.moments,
        "shapes": {
            "moments": described(2, side, side, moments, dtype=stored),
            "context": described(tokens, facts.context_width),
            "pooled": pooled,
            "image": described(side, side, image, dtype=stored) if image else None,
        },
    }


def _takes(family: Family, latent_channels: int) -> int:
    """Channels that the family's models take with so many latent channels."""
    return latent_channels + (family.given.width(latent_channels) if family.given else 0)


def make_planned(config: configs.Config, model: Model, devices: list[Any]) -> Planned:
    """The step that `train` would compile on these devices, which need not be there.

    Raises:
        ValueError: mesh, batch or model do not fit, as training itself would say.
    """
    asked = {axis: config.mesh[axis] for axis in mesh.AXES}
    grid = mesh.make_mesh(**asked, devices=devices)
    mesh.check_batch(config.train.batch_size, config.train.accumulation, grid)
    dtype = config.model.compute_dtype
    frozen_dtype = functools.partial(parameters.frozen_dtype, dtype=dtype)
    unet = parameters.abstract(UNet2DConditionModel, dict(model.unet), dtype=dtype)
    unet.execution = train.make_execution(config, grid)
    train.check_splits(model.family.facts(model.unet), grid.shape["tensor"])
    unet = parameters.without_arrays(adapt(unet, config))
    structure, params = parameters.split(unet)
    objective = OBJECTIVES[config.objective]
    reference: Any = None
    if config.lora.rank:
        reference, params = lora.partition(params)
    elif objective.needs_reference:
        reference = params
    if reference is not None:
        reference = {
            path: jax.ShapeDtypeStruct(x.shape, jnp.dtype(frozen_dtype(path)))
            for path, x in reference.items()
        }
    learning_rate, tx = train.make_optimizer(config)
    setup = train.make_setup(config, model.family, structure, model.schedule, tx, model.meta)
    key = jax.eval_shape(lambda: jax.random.key(0))
    run = train.Run(
        config, epath.Path(), grid, _NO_PAIRS, unet, reference, setup, learning_rate, key
    )
    state = train.abstract_state(run, params)
    arguments = (
        state,
        _placed(reference, mesh.parameter_sharding(grid, reference)),
        pipeline.abstract_batch(model.meta, config.train.batch_size, mesh.batch_sharding(grid)),
        _placed(key, mesh.replicated(grid)),
    )
    update = step.jit_train_step(setup, jax.tree.map(lambda x: x.sharding, state))
    return Planned(update, setup, arguments, grid, model, count_flops(config, model))


_NO_PAIRS: Any = None


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def count_flops(config: configs.Config, model: Model) -> int:
    """What a pair needs, by the analytic count; recomputation apart."""
    shapes, objective = model.meta["shapes"], OBJECTIVES[config.objective]
    _, height, width, _ = shapes["moments"]["shape"]
    forward = flops.unet_forward(
        model.unet,
        height=height,
        width=width,
        tokens=shapes["context"]["shape"][0],
        rank=config.lora.rank,
        targets=config.lora.targets,
    )
    return flops.step_flops(
        forward,
        needs_reference=objective.needs_reference,
        needs_rejected=objective.needs_rejected,
        lora=config.lora.rank > 0,
    )
