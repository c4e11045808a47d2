"""Makes the shipped digits pipeline, except for training its UNet."""

import logging

from etils import epath

from dmpo_jax.parallel import processes
from dmpo_jax.toy.make import write_digits

LOG = logging.getLogger(__name__)


@processes.writes_out
def make_digits(*, out: epath.PathLike, seed: int = 0, vae_steps: int = 1000) -> epath.Path:
    """Writes the pipeline folder and the pairs of real digits into `out`; returns `out`.

    Args:
        seed: of every random draw.
        vae_steps: updates of the VAE, 64 images each; takes minutes on a CPU.
    """
    out = epath.Path(out)
    write_digits(out, seed=seed, vae_steps=vae_steps)
    LOG.info("the digits are in %s; next: dmpo-jax train --config=digits_base", out)
    return out
