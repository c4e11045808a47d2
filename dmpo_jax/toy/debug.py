"""Tiny random pipelines of every family, and pairs of noise to train them on."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from dmpo_jax.data import sources
from dmpo_jax.families import Family, Published
from dmpo_jax.models import parameters
from dmpo_jax.parallel import processes
from dmpo_jax.toy import digits
from dmpo_jax.toy import make as make_digits

LOG = logging.getLogger(__name__)
SMALL_VAE = {**make_digits.VAE, "block_out_channels": [8, 8, 16]}
# Keys of scheduler_config.json that the noise table of each kind reads.
SCHEDULE = {
    "ddpm": ("beta_start", "beta_end", "beta_schedule", "prediction_type"),
    "flow": ("shift", "num_train_timesteps"),
}


def write_debug_files(folder: epath.Path, family: Family) -> tuple[epath.Path, epath.Path]:
    """Writes the family's tiny pipeline and raw pairs into `folder`, unless present.

    Returns (pipeline folder, parquet file). Every process must call it, and all must share
    `folder`.
    """
    kind = jax.devices()[0].platform
    LOG.info(
        "debug run: a tiny random %s model, synthetic pairs, on %s",
        family.name,
        "CPU, since JAX sees no GPU or TPU" if kind == "cpu" else kind.upper(),
    )
    model, pairs = folder / "debug_model", folder / "debug_pairs.parquet"
    missing = not (model / "model_index.json").exists()
    processes.barrier("all have looked")
    if missing:
        write_tiny_pipeline(model, family)  # on every process: saving is collective
    if jax.process_index() == 0 and not pairs.exists():
        sources.write_pick_a_pic(pairs, synthetic_pairs(64, given=family.given_fields))
    processes.barrier("debug files")
    return model, pairs


def model_config(family: Family) -> dict[str, Any]:
    """Returns config.json of the family's tiny model."""
    base = make_digits.UNET if family.component == "unet" else {}
    return {**base, **family.tiny.model}


def vae_config(family: Family) -> dict[str, Any]:
    """Returns config.json of the family's tiny VAE."""
    return {**SMALL_VAE, **family.tiny.vae}


def scheduler_config(family: Family) -> dict[str, Any]:
    """Returns scheduler_config.json of the family's tiny pipeline."""
    base = make_digits.SCHEDULER if family.noise == "ddpm" else {}
    return {**base, **family.tiny.scheduler}


def published(family: Family) -> Published:
    """Returns the shapes of the family's tiny pipeline, as of a published model's."""
    scheduler, vae = scheduler_config(family), vae_config(family)
    own = [part.tokens for part in family.text if part.tokens]
    shared = len(own) < len(family.text)
    return Published(
        family,
        model_config(family),
        scaling_factor=0.18215,  # default of a VAE that names none
        scheduler={name: scheduler[name] for name in SCHEDULE[family.noise] if name in scheduler},
        latent_channels=vae["latent_channels"],
        factor=family.factor(vae),
        tokens=sum(own) + shared * make_digits.TOKENS,
        shift_factor=vae.get("shift_factor", 0.0),
    )


def write_tiny_pipeline(out: epath.Path, family: Family) -> None:
    """Writes a pipeline of the family's parts, with a few hundred thousand random parameters."""
    model, vae = model_config(family), vae_config(family)
    make_digits.write_pipeline(
        out,
        family,
        make_digits.Configs(
            model, family.tiny.text, vae, scheduler_config(family), make_digits.NO_CHECKER
        ),
        vae=parameters.initialise(family.vae, vae, 2),
        model=parameters.initialise(family.model, model, 3),
        seed=0,
    )


def synthetic_pairs(count: int, *, given: Sequence[str] = ()) -> list[dict]:
    """Returns pairs of random images with the digits' captions and labels of all three kinds.

    given: `Family.given_fields`; each pair has the source and mask named there.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2 * count, 48, 40, 3), np.uint8)
    sources_ = rng.integers(0, 256, (count, 40, 48, 3), np.uint8)
    rows = [
        {
            "caption": digits.CAPTIONS[i % 10],
            "jpg_0": sources.encode_image(images[2 * i]),
            "jpg_1": sources.encode_image(images[2 * i + 1]),
            "label_0": (1.0, 0.0, 0.5)[i % 3],
            "label_1": (0.0, 1.0, 0.5)[i % 3],
            "has_label": True,
            "are_different": True,
        }
        for i in range(count)
    ]
    for row, source in zip(rows, sources_, strict=True):
        if "source" in given:
            row["jpg_source"] = sources.encode_image(source)
        if "mask" in given:
            row["mask"] = sources.encode_image(_rectangle(rng, *source.shape[:2]))
    return rows


def _rectangle(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns a white rectangle on black, RGB."""
    mask = np.zeros((height, width, 3), np.uint8)
    top, left = rng.integers(0, (height // 2, width // 2))
    mask[top : top + height // 2, left : left + width // 2] = 255
    return mask
