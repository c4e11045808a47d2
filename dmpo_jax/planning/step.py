"""Builds a training step from shapes alone: no weights, no data, any devices."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.data.encoded import records
from dmpo_jax.data.encoded.meta import EncodedMeta
from dmpo_jax.diffusion.noise import TABLES, NoiseTable
from dmpo_jax.errors import UserError
from dmpo_jax.families import PUBLISHED, Family, Published
from dmpo_jax.models import parameters
from dmpo_jax.parallel import meshes
from dmpo_jax.planning import flops
from dmpo_jax.training.build import StepSettings, TrainingStep, build

LOG = logging.getLogger(__name__)
TOKENS = 77  # of a prompt, if the tokenizer does not state it


class Model(NamedTuple):
    """Facts of a pipeline that a plan needs. config: config.json of the trained component."""

    name: str
    family: Family
    config: Mapping[str, Any]
    noise: NoiseTable
    meta: EncodedMeta


class Planned(NamedTuple):
    """A step to compile.

    update: jitted. arguments: its state, reference, batch and key, as shapes with shardings.
    pair_flops: of one pair, recomputation excluded.
    """

    built: TrainingStep
    update: Any
    arguments: tuple[Any, ...]
    model: Model
    pair_flops: int


def of_published(
    one: Published,
    name: str,
    *,
    resolution: int | None = None,
    moments: str = "sample",
    moments_dtype: str = "bfloat16",
) -> Model:
    """Returns a published model, or a tiny one (`toy.debug.published`), with pairs of `encode`.

    Args:
        resolution: side of the images in pixels; None is that of the model's training.
        moments, moments_dtype: as of `encode`.
    """
    facts = one.family.facts(one.model)
    size = facts.latent_size or (64, 64)
    if resolution:
        size = (resolution // one.factor, resolution // one.factor)
    meta = EncodedMeta.expected(
        one.family,
        facts,
        size=size,
        latent_channels=one.latent_channels,
        tokens=one.tokens,
        scaling_factor=one.scaling_factor,
        shift_factor=one.shift_factor,
        moments=moments,
        moments_dtype=moments_dtype,
    )
    noise = TABLES[one.family.noise](**one.scheduler)
    return Model(name, one.family, one.model, noise, meta)


def of_folder(
    folder: epath.PathLike,
    *,
    encoded: epath.PathLike = "",
    resolution: int | None = None,
    moments: str = "sample",
    moments_dtype: str = "bfloat16",
) -> Model:
    """Returns the model of a pipeline folder, from its config.json files alone.

    Args:
        encoded: folder of encoded pairs; "" assumes pairs as encode would make them.
        others: see `of_published`.

    Raises:
        ValueError: the folder does not exist: a hub id is not downloaded for its shapes.
    """
    if not (epath.Path(folder) / "model_index.json").exists():
        raise UserError(
            f"a plan reads model_index.json and the parts' config.json, and {str(folder)!r} is no "
            "folder that holds them (a hub id is not downloaded): give "
            f"--model={'|'.join(PUBLISHED)}, or a folder"
        )
    path, family = diffusers_io.load_family(folder)
    config = diffusers_io.read_json(path / family.component / "config.json")
    noise, _ = diffusers_io.load_schedule(path)
    if encoded:
        return Model(str(folder), family, config, noise, records.load_meta(encoded))
    LOG.info("data.encoded is not set: the pairs are taken to be as encode would make them")
    # From shapes, so that the config has its class's defaults.
    vae = parameters.abstract(family.vae, diffusers_io.read_json(path / "vae" / "config.json"))
    scaling, shift = family.factors(vae)
    size = family.trained_latents(config, vae.config)
    if resolution:
        size = (resolution // family.factor(vae.config), resolution // family.factor(vae.config))
    meta = EncodedMeta.expected(
        family,
        family.facts(config),
        size=size,
        latent_channels=vae.config.latent_channels,
        tokens=_tokens(path, family),
        scaling_factor=scaling,
        shift_factor=shift,
        moments=moments,
        moments_dtype=moments_dtype,
    )
    return Model(str(folder), family, config, noise, meta)


def _tokens(path: epath.Path, family: Family) -> int:
    """Returns the number of tokens of an embedded prompt."""
    parts = (*family.text, *family.absent)
    own = sum(part.tokens for part in parts if part.tokens)
    shared = [part for part in family.text if not part.tokens]
    if not shared:
        return own
    tokenizer = path / shared[0].tokenizer / "tokenizer_config.json"
    found = diffusers_io.read_json(tokenizer).get("model_max_length", TOKENS)
    return own + (int(found) if found < 10**6 else TOKENS)  # a huge number means no limit


def make_planned(
    model: Model, settings: StepSettings, axes: Mapping[str, int], devices: Sequence[Any]
) -> Planned:
    """Returns the step that `train` would compile on these devices, which may be absent.

    Args:
        axes: sizes of the mesh's axes, as of `meshes.make_mesh`.

    Raises:
        ValueError: mesh, batch or model do not fit, as in training.
    """
    grid = meshes.make_mesh(**axes, devices=devices)
    meshes.check_batch(settings.batch_size, settings.accumulation, grid, settings.group)
    abstract = parameters.abstract(
        model.family.model, dict(model.config), dtype=settings.compute_dtype
    )
    built, params = build(model.family, abstract, model.noise, model.meta, grid, settings)
    arguments = built.abstract_arguments(params)
    update = built.make_update(arguments[0])
    return Planned(built, update, arguments, model, flops.pair_flops(built))
