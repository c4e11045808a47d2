"""A tiny real UNet, or two layers in its place, and what a training step needs beside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dmpo_jax.data.encoded.meta import Arrays, ArraySpec, EncodedMeta
from dmpo_jax.diffusion.noise import make_ddpm_table
from dmpo_jax.families import SD
from dmpo_jax.models import parameters
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.training import build
from dmpo_jax.types import Condition, PairBatch

MOVED = 1e-4  # far enough for margins of order 1, near enough for slopes that are not 0
UNET = {
    "block_out_channels": [16],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
HYPERPARAMETERS = {"beta": 2000.0, "alpha": 0.01}
DMPO = functools.partial(OBJECTIVES["dmpo"], **HYPERPARAMETERS)
META = EncodedMeta(
    model="random",
    scaling_factor=0.18215,
    arrays=Arrays(ArraySpec((2, 4, 4, 8), "float32"), ArraySpec((5, 8), "float32")),
)
SCHEDULE = make_ddpm_table(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
# An optimizer that keeps the gradient for its state, where a test reads it unrounded.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def make_unet(config, dtype=jnp.float32):
    """(predict, parameters) of a UNet that computes in `dtype`."""
    model = parameters.initialise(UNet2DConditionModel, config, 0, dtype=dtype)
    structure, params = parameters.split(model)
    return SD.make_predict(functools.partial(parameters.merge, structure)), params


unet = functools.cache(functools.partial(make_unet, UNET))


def predict_small(params, latents, times, condition):
    """Two layers that see latents, time and text, for what does not depend on the model."""
    rate = times.astype(jnp.float32)[:, None] / 300
    told = jnp.sin(rate @ params["time.kernel"])
    told += condition.context.mean(1) @ params["text.kernel"]
    return (
        jax.nn.silu(latents @ params["first.kernel"] + told[:, None, None]) @ params["last.kernel"]
    )


@functools.cache
def small():
    """Parameters of `predict_small`."""
    rng = np.random.default_rng(0)
    shapes = {"first": (4, 16), "time": (1, 16), "text": (8, 16), "last": (16, 4)}
    return {
        f"{name}.kernel": jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)
        for name, shape in shapes.items()
    }


@functools.cache
def make_setup(accumulation=1, tx=None):
    structure, _ = parameters.split(parameters.abstract(UNet2DConditionModel, UNET))
    return build.make_setup(
        SD, structure, SCHEDULE, META, tx or optax.adamw(1e-3), settings(accumulation=accumulation)
    )


@functools.cache
def make_small_setup(accumulation=1, tx=None):
    return make_setup(accumulation, tx)._replace(predict=predict_small)


def settings(**changes):
    """Settings of a DMPO step."""
    given = {"objective": OBJECTIVES["dmpo"], "hyperparameters": HYPERPARAMETERS, "batch_size": 8}
    return build.StepSettings(**{**given, **changes})


def make_batch(pairs: int, seed: int = 0, size: int = 4) -> PairBatch:
    rng = np.random.default_rng(seed)
    moments = rng.normal(size=(pairs, 2, size, size, 8)).astype(np.float32)
    preference = rng.uniform(0.5, 1, pairs).astype(np.float32)
    context = rng.normal(size=(pairs, 5, 8)).astype(np.float32)
    return PairBatch(moments, preference, Condition(context))


def run_key():
    return jax.random.key(7)


def perturbed(params, scale):
    rng = np.random.default_rng(1)
    return {
        path: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)
        for path, x in params.items()
    }
