"""Preference pairs from a model's own images: sample two a prompt, let a scorer label them."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.data import raw as sources
from dmpo_jax.models import parameters
from dmpo_jax.parallel import mesh
from dmpo_jax.sampling.sampler import make_sampler
from dmpo_jax.scoring import digits as scorers

LOG = logging.getLogger(__name__)


def collect(
    *,
    model: str,
    prompts: Sequence[str],
    scorer: str,
    out: epath.PathLike,
    pairs: int,
    seed: int = 0,
    temperature: float = 1.0,
    labels: str = "drawn",
    tie_margin: float = 0.0,
    variant: str | None = None,
    steps: int = 50,
    guidance_scale: float = 7.5,
    batch_size: int = 8,
    dtype: Any = jnp.float32,
) -> None:
    """Writes `out`, a parquet file in Pick-a-Pic's schema. Does nothing where it exists.

    Prompts take turns; `image_seeds` gives runs of different seeds different images.

    labels: "drawn" or "probability", see `draw_labels` and `win_probability`.

    Raises:
        ValueError: unknown scorer, or a part of the model is missing.
    """
    out = epath.Path(out)
    if out.exists():
        LOG.info("%s is collected already", out)
        return
    score = scorers.get_scorer(scorer)
    pipeline = diffusers_io.load_pipeline(model, variant=variant, dtype=dtype)
    unet = diffusers_io.load_model(pipeline.folder, variant=variant, dtype=dtype)
    sampler = make_sampler(
        pipeline, unet, steps=steps, guidance_scale=guidance_scale, batch_size=batch_size
    )
    params = jax.device_put(parameters.split(unet)[1], mesh.replicated(mesh.make_mesh()))
    asked = [prompts[i % len(prompts)] for i in range(pairs) for _ in range(2)]
    images = sampler(params, asked, image_seeds(seed, 2 * pairs), "collecting")
    scores = score(images, asked).reshape(pairs, 2)
    if labels == "probability":
        preferences = win_probability(scores, temperature)
    else:
        preferences = draw_labels(scores, temperature=temperature, tie_margin=tie_margin, seed=seed)
    jpegs = [sources.encode_image(image) for image in images]
    out.parent.mkdir(parents=True, exist_ok=True)
    sources.write_pick_a_pic(
        out,
        (
            {
                "caption": asked[2 * i],
                "jpg_0": jpegs[2 * i],
                "jpg_1": jpegs[2 * i + 1],
                "label_0": float(label),
                "label_1": float(1 - label),
                "model_0": str(model),
                "model_1": str(model),
                "has_label": True,
                "are_different": True,
            }
            for i, label in enumerate(preferences)
        ),
    )
    first = scores[:, 0] > scores[:, 1]
    decided = (preferences != 0.5) & (scores[:, 0] != scores[:, 1])
    LOG.info(
        "%d pairs, %.0f %% ties; of the others %.0f %% name the image that scores higher; "
        "mean score %.3f",
        pairs,
        100 * (preferences == 0.5).mean(),
        100 * ((preferences > 0.5) == first)[decided].mean() if decided.any() else 0,
        scores.mean(),
    )


def image_seeds(seed: int, count: int) -> list[int]:
    """Seeds of a run's images: below 2**31, where evaluation's begin; no two runs' overlap."""
    if count > 2**20 or not 0 <= seed < 2**11:
        raise ValueError(
            f"seeds are given out for 2**20 images a run and runs 0 to 2047, but got {count} "
            f"images and seed {seed}"
        )
    return [seed * 2**20 + i for i in range(count)]


def win_probability(scores: np.ndarray, temperature: float) -> np.ndarray:
    """That image 0 of `[N, 2]` scores wins: sigmoid((s_0 - s_1) / temperature), Bradley-Terry."""
    with np.errstate(over="ignore"):  # 1 / (1 + inf) is 0
        return 1 / (1 + np.exp((scores[:, 1] - scores[:, 0]) / temperature))


def draw_labels(
    scores: np.ndarray, *, temperature: float, tie_margin: float, seed: int
) -> np.ndarray:
    """Labels for image 0 of `[N, 2]` scores: 0, 1, or 0.5 for a tie.

    Image 0 wins by its `win_probability`, so labels are as noisy as the temperature is high.
    Closer scores than tie_margin tie.
    """
    wins = np.random.default_rng(seed).random(len(scores)) < win_probability(scores, temperature)
    return np.where(np.abs(scores[:, 0] - scores[:, 1]) < tie_margin, 0.5, wins.astype(float))
