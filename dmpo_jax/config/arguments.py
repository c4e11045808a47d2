"""Converts a config's leaves to the plain arguments of the stages."""

from typing import Any

import jax
from etils import epath

from dmpo_jax import storage
from dmpo_jax.config.configs import Config, identity, places
from dmpo_jax.diffusers_io import Start, find_start
from dmpo_jax.encoding.plan import Settings
from dmpo_jax.export.model_card import Card
from dmpo_jax.export.pipeline import Trained
from dmpo_jax.models.lora import Adapters
from dmpo_jax.training.fork import FORK


def pipeline(config: Config) -> dict[str, Any]:
    """Arguments of `diffusers_io.load_pipeline` and `open_sampler` that load a pipeline folder."""
    return {
        "vae": config.model.vae,
        "variant": config.model.variant or None,
        "dtype": config.model.compute_dtype,
    }


def weights(config: Config) -> tuple[str, str | None]:
    """The model's folder and the variant of its weight files."""
    return config.model.folder, config.model.variant or None


def encoders(config: Config) -> dict[str, Any]:
    """Arguments of `provenance.check_encoders` that name what should have made the pairs."""
    folder, variant = weights(config)
    allowed = config.data.any_encoders
    return {"folder": folder, "vae": config.model.vae, "variant": variant, "any_weights": allowed}


def checkpoints(config: Config) -> dict[str, Any]:
    """Arguments of `Checkpoints` that the config alone determines."""
    return {"keep": config.log.keep, "identity": identity(config), "places": places()}


def sampling(config: Config) -> dict[str, Any]:
    """Sampling arguments of `make_sampler` and `open_sampler`."""
    return {
        "steps": config.sample.steps,
        "guidance_scale": config.sample.guidance_scale,
        "batch_size": config.sample.batch_size,
        "negative_prompt": config.sample.negative_prompt,
        "sampler": config.sample.sampler,
        "image_guidance_scale": config.sample.image_guidance_scale,
        "height": config.sample.height,
        "width": config.sample.width,
    }


def drawing(config: Config) -> dict[str, Any]:
    """Arguments of `open_sampler`, the folder apart."""
    return {
        **pipeline(config),
        **sampling(config),
        "vae_dtype": config.sample.vae_dtype,
        "attention": config.model.attention,
    }


def protocol(config: Config) -> dict[str, Any]:
    """The settings of an evaluation that could change a score, as result.json has them."""
    return {
        "name": config.evaluate.protocol,
        "noise": config.evaluate.noise,
        "seed": config.seed,
        **drawing(config),
        "jax": jax.__version__,
        "platform": jax.default_backend(),
    }


def encoding(config: Config, source: str = "") -> Settings:
    """Settings of an encode. source: raw pairs, used if data.source is unset."""
    return Settings(
        source=config.data.source or source,
        model=config.model.folder,
        vae=config.model.vae,
        variant=config.model.variant or None,
        dtype=config.model.compute_dtype,
        resolution=config.data.resolution,
        validation_fraction=config.data.validation_fraction,
        moments=config.data.moments,
        moments_dtype=config.data.moments_dtype,
        flip=config.data.flip,
        crop=config.data.crop,
        ties=config.data.ties,
        max_bad=config.data.max_bad,
        allow_outside=config.data.allow_outside,
        batch_size=config.data.encode_batch,
        num_threads=config.data.num_threads,
        prompts=config.data.prompts,
    )


def trained(config: Config) -> Trained:
    """The pipeline and adapters that a run trains, for `export.pipeline`."""
    return Trained(*weights(config), adapters(config), config.model.vae, config.model.start)


def starts(config: Config) -> tuple[Start, Start]:
    """The weights that a run begins with, and those that margins are measured against.

    The same object if the config names no other reference.
    """
    start = trained(config).begun()
    if not config.model.reference:
        return start, start
    folder, variant = weights(config)
    named = config.model.reference
    return start, find_start(folder, named, option="model.reference", variant=variant)


def adapters(config: Config) -> Adapters | None:
    """The adapters that a config trains; None if it trains every parameter."""
    if not config.lora.rank:
        return None
    return Adapters(
        rank=config.lora.rank,
        targets=tuple(config.lora.targets),
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        seed=config.seed,
    )


def card(config: Config, workdir: epath.PathLike) -> Card:
    """Content of a run's model card: its model, data and settings."""
    encoded = config.data.encoded or str(epath.Path(workdir) / "encoded")
    return Card(
        trained=trained(config),
        objective=config.objective,
        pairs_per_update=config.train.batch_size,
        ema_decay=config.train.ema_decay,
        pairs=tuple(config.data.mix) if config.data.mix else encoded,
        settings=identity(config),
        workdir=epath.Path(workdir),
        forked=storage.find_json(epath.Path(workdir) / FORK),
    )
