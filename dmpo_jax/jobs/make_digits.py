"""Makes the embedded digits pipeline, less its UNet's training."""

import logging

from etils import epath

from dmpo_jax.toy.make import write_digits

LOG = logging.getLogger(__name__)


def make_digits(*, out: epath.PathLike, seed: int = 0, vae_steps: int = 1000) -> epath.Path:
    """Writes the pipeline folder and the real digits' pairs into `out`, and returns it.

    Args:
        seed: of every random draw.
        vae_steps: updates of the VAE, 64 images each; minutes on a CPU.
    """
    out = epath.Path(out)
    write_digits(out, seed=seed, vae_steps=vae_steps)
    LOG.info("the digits are in %s; next: train --config=configs/digits_base.py", out)
    return out
